// Verifies every live token with jose once a second, with keys as old as Cache-Control allows and no younger.
//
//   node live.mjs --jwks URL --issuer ISS --audience AUD
//
// Tokens come on standard input, one per line; at its end, prints one line of JSON:
// {"tokens", "checks", "kids", "failures"}. An unknown key is a failure and no reason to fetch the keys again.
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";

import { createRemoteJWKSet, decodeJwt, decodeProtectedHeader, jwtVerify } from "jose";

import { maxAge } from "./cached.mjs";

const names = ["jwks", "issuer", "audience"];
const { values } = parseArgs({ options: Object.fromEntries(names.map((name) => [name, { type: "string" }])) });
const { issuer, audience } = values;
const url = new URL(values.jwks);

const report = { tokens: 0, checks: 0, kids: [], failures: [] };
let live = [];

function take(token) {
  const { kid, alg } = decodeProtectedHeader(token);
  if (!report.kids.includes(kid)) report.kids.push(kid);
  report.tokens++;
  live.push({ token, kid, alg, exp: decodeJwt(token).exp });
}

async function verifyAll(keys) {
  live = live.filter(({ exp }) => exp > Date.now() / 1000);
  for (const { token, kid, alg, exp } of live) {
    report.checks++;
    try {
      await jwtVerify(token, keys, { issuer, audience, algorithms: [alg], requiredClaims: ["exp", "iat", "jti"] });
    } catch (error) {
      // It may have ended since the list was made.
      if (exp <= Date.now() / 1000) continue;
      if (report.failures.length < 20) report.failures.push(`${new Date().toISOString()} ${kid}: ${error.message}`);
    }
  }
}

try {
  const keys = createRemoteJWKSet(url, { cacheMaxAge: 1000 * maxAge(await fetch(url)), cooldownDuration: Infinity });
  console.error("ready");
  let ended = false;
  createInterface({ input: process.stdin }).on("line", take).on("close", () => (ended = true));
  while (!ended) {
    const begun = Date.now();
    await verifyAll(keys);
    await new Promise((done) => setTimeout(done, Math.max(0, 1000 - (Date.now() - begun))));
  }
  await verifyAll(keys);
  console.log(JSON.stringify(report));
} catch (error) {
  console.error(`live: ${error.stack}`);
  process.exitCode = 1;
}
