// A relying party on openid-client: signs in again and again, and verifies what it gets.
//
//   IDP_ISSUER=URL IDP_CLIENT_ID=ID IDP_CLIENT_SECRET=SECRET node relying.mjs [--redirect-uri URI]
//
// Signs in until its standard input ends. Each ID token is verified by openid-client, with its signature; then every
// ID token and JWT access token that is alive is verified with jose once a second, with the keys as old as the
// provider's Cache-Control allows. Then prints one line of JSON: {"signed_in", "checks", "kids",
// "failures", "switched"}.
import { parseArgs } from "node:util";

import { createRemoteJWKSet, decodeJwt, decodeProtectedHeader, jwtVerify } from "jose";
import * as oidc from "openid-client";

import { authorize } from "./browser.mjs";
import { maxAge } from "./cached.mjs";

const options = { "redirect-uri": { type: "string", default: "http://127.0.0.1:8281/callback" } };
const redirectUri = parseArgs({ options }).values["redirect-uri"];
const { IDP_ISSUER, IDP_CLIENT_ID, IDP_CLIENT_SECRET } = process.env;

const report = { signed_in: 0, checks: 0, kids: [], failures: [], switched: 0 };
let live = [];
let goesOn = true;
process.stdin.on("end", () => (goesOn = false)).resume();

function failed(what, error) {
  if (report.failures.length < 20) report.failures.push(`${what}: ${error.message} ${error.cause?.message ?? ""}`);
}

async function offered() {
  const metadata = await (await fetch(new URL("/.well-known/openid-configuration", IDP_ISSUER))).json();
  return metadata.id_token_signing_alg_values_supported[0];
}

// A client is bound to one algorithm. One that began under the one and ended under the other has to begin again.
let begunWith;

async function signIn() {
  // Begins without anything remembered: openid-client has rules of its own for how old its keys may be.
  const insecure = { execute: [oidc.allowInsecureRequests] };
  const auth = oidc.ClientSecretBasic(IDP_CLIENT_SECRET);
  const probe = await oidc.discovery(new URL(IDP_ISSUER), IDP_CLIENT_ID, undefined, auth, insecure);
  const [alg] = probe.serverMetadata().id_token_signing_alg_values_supported;
  begunWith = alg;
  const metadata = { client_secret: IDP_CLIENT_SECRET, id_token_signed_response_alg: alg };
  const config = new oidc.Configuration(probe.serverMetadata(), IDP_CLIENT_ID, metadata, auth);
  oidc.allowInsecureRequests(config);
  oidc.enableNonRepudiationChecks(config);
  const verifier = oidc.randomPKCECodeVerifier();
  const checks = { pkceCodeVerifier: verifier, expectedState: oidc.randomState(), expectedNonce: oidc.randomNonce() };
  const url = oidc.buildAuthorizationUrl(config, {
    redirect_uri: redirectUri,
    scope: "openid offline_access api",
    prompt: "consent",
    state: checks.expectedState,
    nonce: checks.expectedNonce,
    code_challenge: await oidc.calculatePKCECodeChallenge(verifier),
    code_challenge_method: "S256",
  });
  const back = new URL(redirectUri);
  back.search = await authorize(url, redirectUri);
  const tokens = await oidc.authorizationCodeGrant(config, back, { ...checks, idTokenExpected: true });
  return { alg, tokens: [tokens.id_token, tokens.access_token] };
}

async function keys() {
  const url = new URL("/jwks", IDP_ISSUER);
  const cacheMaxAge = 1000 * maxAge(await fetch(url));
  // No key that is unknown is a reason to look again before that: verifiers that would hide mistakes.
  return createRemoteJWKSet(url, { cacheMaxAge, cooldownDuration: Infinity });
}

async function verifyAll(jwks) {
  const now = Date.now() / 1000;
  live = live.filter(({ exp }) => exp > now + 1);
  for (const { token, alg } of live) {
    report.checks++;
    await jwtVerify(token, jwks, { issuer: IDP_ISSUER, algorithms: [alg] }).catch((error) => failed("verify", error));
  }
}

try {
  const jwks = await keys();
  let next = 0;
  while (goesOn) {
    try {
      const { alg, tokens } = await signIn();
      report.signed_in++;
      for (const token of tokens) {
        const { kid } = decodeProtectedHeader(token);
        if (!report.kids.includes(kid)) report.kids.push(kid);
        live.push({ token, alg, exp: decodeJwt(token).exp });
      }
    } catch (error) {
      if ((await offered()) === begunWith) failed("sign in", error);
      else report.switched++;
    }
    if (Date.now() >= next) {
      next = Date.now() + 1000;
      await verifyAll(jwks);
    }
    await new Promise((done) => setTimeout(done, 100));
  }
  console.log(JSON.stringify(report));
} catch (error) {
  console.error(`relying: ${error.stack}`);
  process.exitCode = 1;
}
