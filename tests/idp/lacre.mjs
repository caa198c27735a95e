// Has tokens of oidc-provider signed by Lacre: the private key is in the HSM, and rotates there.
// docs/guides/oidc-provider.md tells how the parts belong together.
import { createPublicKey } from "node:crypto";

import { ExternalSigningKey } from "oidc-provider";

// A session with Lacre by client credentials.
export class Lacre {
  #url;
  #authorization;
  #token;
  #renewAt = 0;

  constructor(url, clientId, clientSecret) {
    this.#url = url;
    const credentials = [clientId, clientSecret].map(encodeURIComponent).join(":");
    this.#authorization = `Basic ${Buffer.from(credentials).toString("base64")}`;
  }

  // The key that signs now: { kid, alg, jwk }.
  currentKey() {
    return this.#ask("GET", "/v1/signing-keys/current");
  }

  // The signature of `header.payload`, which must name the current key.
  async sign(signingInput) {
    const { signature } = await this.#ask("POST", "/v1/jws", { signing_input: signingInput });
    return Buffer.from(signature, "base64url");
  }

  // What verifiers are to know, with the headers that say for how long.
  jwks() {
    return fetch(`${this.#url}/oidc/jwks`, { signal: AbortSignal.timeout(5000) });
  }

  async #ask(method, path, body) {
    // Once more with a new token if the old one is accepted no longer: its key may have been revoked.
    for (let tries = 2; ; tries--) {
      const headers = { authorization: `Bearer ${await this.#bearer()}`, "content-type": "application/json" };
      const request = { method, headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout(5000) };
      const response = await fetch(this.#url + path, request);
      if (response.ok) return response.json();
      if (response.status === 401 && tries > 1) this.#renewAt = 0;
      else throw new Error(`Lacre answered ${response.status} at ${path}: ${await response.text()}`);
    }
  }

  #bearer() {
    if (Date.now() >= this.#renewAt) {
      this.#renewAt = Infinity; // One request for all that wait.
      this.#token = this.#grant().catch((error) => {
        this.#renewAt = 0;
        throw error;
      });
    }
    return this.#token;
  }

  async #grant() {
    const headers = { authorization: this.#authorization };
    const body = new URLSearchParams({ grant_type: "client_credentials", scope: "tokens:sign" });
    const response = await fetch(`${this.#url}/oidc/token`, { method: "POST", headers, body, signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw new Error(`Lacre's token endpoint answered ${response.status}`);
    const { access_token: token, expires_in: lifetime } = await response.json();
    this.#renewAt = Date.now() + lifetime * 800;
    return token;
  }
}

// One of Lacre's keys, as oidc-provider wants it: the public half, and somebody to ask for signatures.
export class LacreKey extends ExternalSigningKey {
  #lacre;
  #public;

  constructor(lacre, { kid, alg, jwk }) {
    super();
    this.#lacre = lacre;
    this.#public = createPublicKey({ key: jwk, format: "jwk" });
    this.kid = kid;
    this.alg = alg;
  }

  keyObject() {
    return this.#public;
  }

  sign(signingInput) {
    return this.#lacre.sign(signingInput.toString("ascii"));
  }
}

// Calls `build(key)` with the key that signs now, and again whenever another has taken over. What was built last is
// in `current`. Looks more often than Lacre's `propagation` is long (30 s by default): for so long the key before is
// still accepted, so that nothing that was begun with it is lost.
export async function follow(lacre, build, everyMs = 5000) {
  const state = {};
  let kid;
  const look = async () => {
    const key = await lacre.currentKey();
    if (key.kid === kid) return;
    state.current = build(new LacreKey(lacre, key));
    kid = key.kid;
  };
  await look();
  state.timer = setInterval(() => look().catch((error) => console.error(error.message)), everyMs);
  return state;
}
