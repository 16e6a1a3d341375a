// What every client is asked to do, and how it says what came of it; as report.py.
import { createInterface } from "node:readline";

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
export const asked = JSON.parse((await lines.next()).value);
export const QUESTION = "What happens?";
export const ENDLESS = 7000;

export async function waitForTheVerdict(seen) {
  console.log(JSON.stringify(seen));
  await lines.next();
  process.exit(0);
}
