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
import { randomBytes } from "node:crypto";
import http from "node:http";

import { exportJWK, generateKeyPair } from "jose";

// What oidc-provider notes about its development defaults belongs on stderr; stdout is one line.
console.info = console.warn;
const { default: Provider } = await import("oidc-provider");

const account = "ana@example.test";
const redirectUri = "http://127.0.0.1:8281/callback";
const ttl = Number(process.env.IDP_ACCESS_TOKEN_TTL ?? 3600);
const resource = process.env.IDP_RESOURCE;
const client = {
  client_id: "lacre-tests",
  client_secret: randomBytes(24).toString("base64url"),
  grant_types: ["authorization_code", "refresh_token", "client_credentials"],
  response_types: ["code"],
  redirect_uris: [redirectUri],
  // A web client may use http only where the provider is told so; a native one may on loopback.
  application_type: "native",
  token_endpoint_auth_method: "client_secret_basic",
  id_token_signed_response_alg: "ES256",
};

async function signingKey() {
  const { privateKey } = await generateKeyPair("ES256", { extractable: true });
  return { ...(await exportJWK(privateKey)), alg: "ES256", use: "sig", kid: "idp-1" };
}

function configuration(key) {
  return {
    clients: [client],
    jwks: { keys: [key] },
    cookies: { keys: [randomBytes(32).toString("hex")] },
    scopes: ["openid", "offline_access", "email", "profile", "api"],
    claims: { openid: ["sub"], email: ["email", "email_verified"], profile: ["name"] },
    pkce: { required: () => true },
    ttl: { AccessToken: ttl, ClientCredentials: ttl, IdToken: 3600, RefreshToken: 14 * 24 * 3600 },
    // As identity providers with rotation do: a refresh token works once, and a second use revokes the family.
    rotateRefreshToken: true,
    issueRefreshToken: async (_ctx, holder, code) =>
      holder.grantTypeAllowed("refresh_token") && code.scopes.has("offline_access"),
    findAccount: async (_ctx, id) => ({
      accountId: id,
      claims: async () => ({ sub: id, email: id, email_verified: true, name: "Ana Teste" }),
    }),
    interactions: { url: (_ctx, interaction) => `/interaction/${interaction.uid}` },
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      introspection: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => resource,
        useGrantedResource: () => true,
        getResourceServerInfo: () => ({
          scope: "api",
          audience: resource,
          accessTokenTTL: ttl,
          accessTokenFormat: "jwt",
          jwt: { sign: { alg: "ES256" } },
        }),
      },
    },
  };
}

// Answers an interaction as a person would who signs in and agrees to everything that is asked.
async function answer(provider, request, response) {
  const { prompt, params, grantId } = await provider.interactionDetails(request, response);
  if (prompt.name === "login") {
    return provider.interactionFinished(request, response, { login: { accountId: account } });
  }
  const known = grantId ? await provider.Grant.find(grantId) : undefined;
  const grant = known ?? new provider.Grant({ accountId: account, clientId: params.client_id });
  grant.addOIDCScope(params.scope);
  for (const [indicator, scopes] of Object.entries(prompt.details.missingResourceScopes ?? {})) {
    grant.addResourceScope(indicator, scopes.join(" "));
  }
  const consent = { grantId: await grant.save() };
  return provider.interactionFinished(request, response, { consent }, { mergeWithLastSubmission: true });
}

const server = http.createServer();
server.listen(Number(process.argv[2] ?? 0), "127.0.0.1", async () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, configuration(await signingKey()));
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
