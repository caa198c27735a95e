// The OpenID provider of provider.mjs as an upstream: `node upstream.mjs [PORT]` (0 or nothing: any).
//
// Every code brings a refresh token; it rotates, and a second use of one ends its grant. Environment as in
// provider.mjs, and the same line when it listens. Two addresses are for the tests alone:
//   GET /test/report   {"granted": {"refresh_token": 1, ...}, "refused": [...], "reused": 0, "revoked": 0}
//   POST /test/end     every grant ends, as when a person takes back a consent
import http from "node:http";

import { exportJWK, generateKeyPair } from "jose";

import { account, answer, client, configuration, redirectUri } from "./sample.mjs";

// What oidc-provider notes about its development defaults belongs on stderr; stdout is one line.
console.info = console.warn;
const { default: Provider } = await import("oidc-provider");

const report = { granted: {}, refused: [], reused: 0, revoked: 0 };
const grants = new Set();

async function signingKey() {
  const { privateKey } = await generateKeyPair("ES256", { extractable: true });
  return { ...(await exportJWK(privateKey)), alg: "ES256", use: "sig", kid: "upstream-1" };
}

function build(issuer, key) {
  const provider = new Provider(issuer, {
    ...configuration({ keys: [key] }, "ES256"),
    issueRefreshToken: async (_ctx, holder) => holder.grantTypeAllowed("refresh_token"),
    expiresWithSession: async () => false,
    // The tests wait for the end of tokens.
    clockTolerance: 0,
  });
  provider.on("server_error", (_ctx, error) => console.error(error));
  provider.on("refresh_token.saved", (token) => grants.add(token.grantId));
  provider.on("grant.success", (ctx) => {
    const type = ctx.oidc.params.grant_type;
    report.granted[type] = (report.granted[type] ?? 0) + 1;
  });
  provider.on("grant.error", (_ctx, error) => {
    report.refused.push(`${error.error}: ${error.error_detail ?? error.error_description}`);
    if (/already used/.test(error.error_detail ?? "")) report.reused++;
  });
  provider.on("grant.revoked", () => report.revoked++);
  return provider;
}

async function end(provider) {
  for (const id of grants) {
    await Promise.all([provider.RefreshToken, provider.AccessToken].map((model) => model.revokeByGrantId(id)));
  }
  grants.clear();
}

const server = http.createServer();
server.listen(Number(process.argv[2] ?? 0), "127.0.0.1", async () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = build(issuer, await signingKey());
  const serve = provider.callback();
  server.on("request", (request, response) => {
    if (process.env.IDP_VERBOSE) console.error(request.method, request.url);
    const failed = (error) => {
      console.error(error);
      response.writeHead(500).end();
    };
    if (request.url === "/test/report") response.end(JSON.stringify(report));
    else if (request.url === "/test/end") end(provider).then(() => response.end(), failed);
    else if (request.url.startsWith("/interaction/")) answer(provider, request, response).catch(failed);
    else serve(request, response);
  });
  const facts = { issuer, client_id: client.client_id, client_secret: client.client_secret };
  Object.assign(facts, { redirect_uri: redirectUri, account });
  console.log("idp ready " + Object.entries(facts).map(([name, value]) => `${name}=${value}`).join(" "));
});

if (process.env.IDP_DIE_WITH_STDIN) process.stdin.on("end", () => process.exit(0)).resume();
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(0));
