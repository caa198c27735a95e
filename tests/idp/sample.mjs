// What the providers of the tests have in common: one client, one account, and the answers of a person who agrees
// to everything. Options from the environment as in provider.mjs, and IDP_ID_TOKEN_TTL (seconds, 3600).
import { randomBytes } from "node:crypto";

export const account = "ana@example.test";
export const redirectUri = "http://127.0.0.1:8281/callback";
const ttl = Number(process.env.IDP_ACCESS_TOKEN_TTL ?? 3600);
const idTokenTtl = Number(process.env.IDP_ID_TOKEN_TTL ?? 3600);
const resource = process.env.IDP_RESOURCE;
export const client = {
  client_id: "lacre-tests",
  client_secret: randomBytes(24).toString("base64url"),
  grant_types: ["authorization_code", "refresh_token", "client_credentials"],
  response_types: ["code"],
  redirect_uris: [redirectUri],
  // A web client may use http only where the provider is told so; a native one may on loopback.
  application_type: "native",
  token_endpoint_auth_method: "client_secret_basic",
};

// Kept over rebuilt providers: what a browser brings must be known again.
const cookieKeys = [randomBytes(32).toString("hex")];

// `alg` signs ID tokens and JWT access tokens; `jwks` is what the provider signs with.
export function configuration(jwks, alg, more = {}) {
  return {
    clients: [{ ...client, id_token_signed_response_alg: alg }],
    jwks,
    cookies: { keys: cookieKeys },
    enabledJWA: { idTokenSigningAlgValues: [alg] },
    scopes: ["openid", "offline_access", "email", "profile", "api"],
    claims: { openid: ["sub"], email: ["email", "email_verified"], profile: ["name"] },
    pkce: { required: () => true },
    ttl: { AccessToken: ttl, ClientCredentials: ttl, IdToken: idTokenTtl, RefreshToken: 14 * 24 * 3600 },
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
      ...more,
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
          jwt: { sign: { alg } },
        }),
      },
    },
  };
}

// Answers an interaction as a person would who signs in and agrees to everything that is asked.
export async function answer(provider, request, response) {
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
