// A real OpenID provider on loopback, for the tests: `node provider.mjs [PORT]` (0 or nothing: any).
//
// One client that may use the authorization code flow with PKCE, refresh tokens and client
// credentials, and one account. Sign-in and consent are given at once, without pages, so that
// obtain.mjs can walk through the whole flow without a browser. Everything is in memory.
// Prints one line when it listens:
//   idp ready issuer=... client_id=... client_secret=... redirect_uri=... account=...
// Options from the environment: IDP_ACCESS_TOKEN_TTL (seconds, 3600), IDP_RESOURCE (a resource
// indicator; its access tokens are signed JWTs, others are opaque), IDP_VERBOSE (log requests).
// Ends with its standard input when IDP_DIE_WITH_STDIN is set, so that a killed test leaves nothing.
import http from "node:http";

import { exportJWK, generateKeyPair } from "jose";

import { account, answer, client, configuration, redirectUri } from "./sample.mjs";

// What oidc-provider notes about its development defaults belongs on stderr; stdout is one line.
console.info = console.warn;
const { default: Provider } = await import("oidc-provider");

async function signingKey() {
  const { privateKey } = await generateKeyPair("ES256", { extractable: true });
  return { ...(await exportJWK(privateKey)), alg: "ES256", use: "sig", kid: "idp-1" };
}

const server = http.createServer();
server.listen(Number(process.argv[2] ?? 0), "127.0.0.1", async () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, configuration({ keys: [await signingKey()] }, "ES256"));
  provider.on("server_error", (_ctx, error) => console.error(error));
  const serve = provider.callback();
  server.on("request", (request, response) => {
    if (process.env.IDP_VERBOSE) console.error(request.method, request.url);
    if (!request.url.startsWith("/interaction/")) return serve(request, response);
    answer(provider, request, response).catch((error) => {
      console.error(error);
      response.writeHead(500).end();
    });
  });
  const facts = { issuer, client_id: client.client_id, client_secret: client.client_secret };
  Object.assign(facts, { redirect_uri: redirectUri, account });
  console.log("idp ready " + Object.entries(facts).map(([name, value]) => `${name}=${value}`).join(" "));
});

if (process.env.IDP_DIE_WITH_STDIN) process.stdin.on("end", () => process.exit(0)).resume();
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(0));
