// Walks the authorization code flow with PKCE against an OpenID provider, as a browser and a client
// would, and prints the token set as the provider sent it, byte for byte.
//
//   node obtain.mjs --issuer URL --client-id ID --client-secret SECRET
//                   [--redirect-uri URI] [--scope "openid offline_access"] [--refresh TOKEN]
//
// With --refresh the flow is skipped and the refresh token is exchanged instead. Each option can
// also be given in the environment: IDP_ISSUER, IDP_CLIENT_ID, IDP_CLIENT_SECRET, IDP_REDIRECT_URI,
// IDP_SCOPE, IDP_REFRESH. Exit 1 with one line on stderr if the provider refuses.
import { createHash, randomBytes } from "node:crypto";
import { parseArgs } from "node:util";

import { createRemoteJWKSet, jwtVerify } from "jose";

import { authorize } from "./browser.mjs";

const names = ["issuer", "client-id", "client-secret", "redirect-uri", "scope", "refresh"];
const { values } = parseArgs({ options: Object.fromEntries(names.map((name) => [name, { type: "string" }])) });

function option(name, fallback) {
  const value = values[name] ?? process.env["IDP_" + name.toUpperCase().replaceAll("-", "_")] ?? fallback;
  if (value === undefined) throw new Error(`--${name} is missing`);
  return value;
}

async function discover(issuer) {
  const response = await fetch(new URL("/.well-known/openid-configuration", issuer));
  const found = await response.json();
  if (found.issuer !== issuer) throw new Error(`the provider calls itself ${found.issuer}, not ${issuer}`);
  return found;
}

async function token(endpoint, id, secret, form) {
  const basic = Buffer.from(`${encodeURIComponent(id)}:${encodeURIComponent(secret)}`).toString("base64");
  const headers = { authorization: `Basic ${basic}` };
  const response = await fetch(endpoint, { method: "POST", headers, body: new URLSearchParams(form) });
  const text = await response.text();
  if (!response.ok) throw new Error(`token endpoint: ${response.status} ${text}`);
  return text;
}

async function codeFlow(provider, id, secret) {
  const verifier = randomBytes(32).toString("base64url");
  const state = randomBytes(16).toString("base64url");
  const nonce = randomBytes(16).toString("base64url");
  const redirectUri = option("redirect-uri", "http://127.0.0.1:8281/callback");
  const url = new URL(provider.authorization_endpoint);
  url.search = new URLSearchParams({
    response_type: "code",
    client_id: id,
    redirect_uri: redirectUri,
    scope: option("scope", "openid offline_access"),
    // OpenID Connect Core, section 11: offline_access is granted only where consent is asked for.
    prompt: "consent",
    state,
    nonce,
    code_challenge: createHash("sha256").update(verifier).digest("base64url"),
    code_challenge_method: "S256",
  });

  const back = await authorize(url, redirectUri);
  if (back.get("error")) throw new Error(`${back.get("error")}: ${back.get("error_description")}`);
  if (back.get("state") !== state) throw new Error("state does not match");
  // RFC 9207: the answer names who gave it.
  if (back.get("iss") !== provider.issuer) throw new Error("iss does not match");

  const form = { grant_type: "authorization_code", code: back.get("code"), redirect_uri: redirectUri };
  const text = await token(provider.token_endpoint, id, secret, { ...form, code_verifier: verifier });
  const keys = createRemoteJWKSet(new URL(provider.jwks_uri));
  const expected = { issuer: provider.issuer, audience: id };
  const { payload } = await jwtVerify(JSON.parse(text).id_token, keys, expected);
  if (payload.nonce !== nonce) throw new Error("nonce does not match");
  return text;
}

try {
  const provider = await discover(option("issuer"));
  const [id, secret] = [option("client-id"), option("client-secret")];
  const refresh = option("refresh", "");
  const form = { grant_type: "refresh_token", refresh_token: refresh };
  const text = refresh ? await token(provider.token_endpoint, id, secret, form) : await codeFlow(provider, id, secret);
  process.stdout.write(text + "\n");
} catch (error) {
  console.error(`obtain: ${error.message}`);
  process.exitCode = 1;
}
