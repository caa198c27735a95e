// Goes where a browser is sent, signs in and agrees: reads an authorization URI from standard input and prints what
// comes back to the application, as JSON: {"code": "...", "state": "...", "iss": "..."}.
import { readFileSync } from "node:fs";

import { authorize } from "./browser.mjs";

try {
  const url = new URL(readFileSync(0, "utf8").trim());
  const back = await authorize(url, url.searchParams.get("redirect_uri"));
  console.log(JSON.stringify(Object.fromEntries(back)));
} catch (error) {
  console.error(`visit: ${error.message}`);
  process.exitCode = 1;
}
