// The OpenID provider of provider.mjs, with its tokens signed by Lacre: `node external.mjs PORT`.
//
// Environment: LACRE_URL, LACRE_CLIENT_ID, LACRE_CLIENT_SECRET, LACRE_POLL_MS (5000), and that of provider.mjs.
// Prints the same line when it listens, and ends in the same ways.
import http from "node:http";

import { Lacre, follow } from "./lacre.mjs";
import { account, answer, client, configuration, redirectUri } from "./sample.mjs";

// What oidc-provider notes about its development defaults belongs on stderr; stdout is one line.
console.info = console.warn;
const { default: Provider } = await import("oidc-provider");

const issuer = `http://127.0.0.1:${process.argv[2]}`;
const { LACRE_URL, LACRE_CLIENT_ID, LACRE_CLIENT_SECRET, LACRE_POLL_MS } = process.env;
const lacre = new Lacre(LACRE_URL, LACRE_CLIENT_ID, LACRE_CLIENT_SECRET);

// A provider does not change its keys, so there is a new one for each. Requests that are under way end with the
// provider they began with; what has to outlive it is in the adapter's storage.
function build(key) {
  const features = { externalSigningSupport: { enabled: true, ack: "experimental-01" } };
  const provider = new Provider(issuer, configuration({ keys: [key] }, key.alg, features));
  provider.on("server_error", (_ctx, error) => console.error(error));
  return { provider, serve: provider.callback() };
}

// Verifiers need more keys than the one that signs: the next one, and those of tokens that are still alive.
async function publish(response) {
  const found = await lacre.jwks();
  const headers = {};
  for (const name of ["content-type", "cache-control", "etag"]) headers[name] = found.headers.get(name);
  response.writeHead(found.status, headers).end(await found.text());
}

const state = await follow(lacre, build, Number(LACRE_POLL_MS ?? 5000));
const server = http.createServer((request, response) => {
  if (process.env.IDP_VERBOSE) console.error(request.method, request.url);
  const failed = (error) => {
    console.error(error);
    response.writeHead(500).end();
  };
  const { provider, serve } = state.current;
  if (request.url === "/jwks") publish(response).catch(failed);
  else if (request.url.startsWith("/interaction/")) answer(provider, request, response).catch(failed);
  else serve(request, response);
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => {
  const facts = { issuer, client_id: client.client_id, client_secret: client.client_secret };
  Object.assign(facts, { redirect_uri: redirectUri, account });
  console.log("idp ready " + Object.entries(facts).map(([name, value]) => `${name}=${value}`).join(" "));
});

if (process.env.IDP_DIE_WITH_STDIN) process.stdin.on("end", () => process.exit(0)).resume();
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(0));
