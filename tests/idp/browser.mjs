// As much of a browser as the authorization code flow needs.

// The provider keeps its interaction in cookies with paths; a browser would do no more than this.
class CookieJar {
  #cookies = new Map();

  header(url) {
    const fit = [...this.#cookies.values()].filter(({ path }) => url.pathname.startsWith(path));
    return fit.map(({ name, value }) => `${name}=${value}`).join("; ");
  }

  take(response) {
    for (const line of response.headers.getSetCookie()) {
      const [pair, ...attributes] = line.split(";").map((part) => part.trim());
      const name = pair.slice(0, pair.indexOf("="));
      const value = pair.slice(pair.indexOf("=") + 1);
      const attribute = (key) => attributes.find((text) => text.toLowerCase().startsWith(key + "="))?.slice(key.length + 1);
      const path = attribute("path") ?? "/";
      const gone = value === "" || new Date(attribute("expires") ?? "9999-01-01") < new Date();
      if (gone) this.#cookies.delete(name + path);
      else this.#cookies.set(name + path, { name, value, path });
    }
  }
}

// Follows redirects by hand, because the last one goes to the client, who is not there to be called.
export async function authorize(url, redirectUri) {
  const jar = new CookieJar();
  for (let step = 0; step < 12; step++) {
    const response = await fetch(url, { redirect: "manual", headers: { cookie: jar.header(url) } });
    await response.arrayBuffer();
    jar.take(response);
    const location = response.headers.get("location");
    if (!location) throw new Error(`the provider answered ${response.status} at ${url.pathname}`);
    const next = new URL(location, url);
    if (next.href.startsWith(redirectUri + "?")) return next.searchParams;
    url = next;
  }
  throw new Error("the provider redirects without end");
}
