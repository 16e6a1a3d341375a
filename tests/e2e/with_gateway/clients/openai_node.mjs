// OpenAI's SDK for Node.
import OpenAI from "openai";
import { ENDLESS, QUESTION, asked, waitForTheVerdict } from "./report.mjs";

const client = new OpenAI({ baseURL: asked.base_url, apiKey: "unused", maxRetries: 0, timeout: 60_000 });
const messages = [
  {
    role: "user",
    content: [
      { type: "video_url", video_url: { url: asked.clip_url } },
      { type: "text", text: QUESTION },
    ],
  },
];
const common = { model: "fast", messages, temperature: 0, max_tokens: 4 };

const answer = await client.chat.completions.create(common);
const chunks = [];
for await (const chunk of await client.chat.completions.create({
  ...common,
  stream: true,
  stream_options: { include_usage: true },
})) {
  chunks.push(chunk);
}
let error;
try {
  await client.chat.completions.create({ ...common, aot: { retention: 0.9 } });
} catch (caught) {
  error = { status: caught.status, code: caught.code, param: caught.param };
}
const endless = await client.chat.completions.create({
  ...common,
  max_tokens: ENDLESS,
  ignore_eos: true,
  stream: true,
});
for await (const _ of endless) {
  break;
}
endless.controller.abort();
await waitForTheVerdict({
  text: answer.choices[0].message.content,
  video_tokens: answer.usage.video_tokens,
  streamed: chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""),
  streamed_video_tokens: chunks.at(-1).usage.video_tokens,
  error,
});
