// Verifies a JWT from stdin with jose (ES256 only) and prints its claims.
//
//   node jose.mjs --jwks URL|FILE --issuer ISS --audience AUD [--typ at+jwt] < token
//
// Exit 1 with one line on stderr if anything about the token is not as stated.
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";

import { createLocalJWKSet, jwtVerify } from "jose";

const names = ["jwks", "issuer", "audience", "typ"];

async function keySet(place) {
  if (!/^https?:/.test(place)) return JSON.parse(readFileSync(place, "utf8"));
  const response = await fetch(place);
  if (!response.ok) throw new Error(`${place} answered ${response.status}`);
  return response.json();
}

try {
  const { values } = parseArgs({ options: Object.fromEntries(names.map((name) => [name, { type: "string" }])) });
  const missing = ["jwks", "issuer", "audience"].filter((name) => !values[name]);
  if (missing.length) throw new Error(`--${missing[0]} is missing`);
  const token = readFileSync(0, "utf8").trim();
  const { jwks, issuer, audience, typ } = values;
  const rules = { issuer, audience, typ, algorithms: ["ES256"], requiredClaims: ["exp", "iat"] };
  const { payload } = await jwtVerify(token, createLocalJWKSet(await keySet(jwks)), rules);
  console.log(JSON.stringify(payload));
} catch (error) {
  console.error(`jose: ${error.message}`);
  process.exitCode = 1;
}
