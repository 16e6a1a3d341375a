// Vercel's AI SDK 6, in which a text part becomes a video.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { ENDLESS, QUESTION, asked, waitForTheVerdict } from "./report.mjs";

const provider = createOpenAICompatible({
  name: "aot",
  baseURL: asked.base_url,
  apiKey: "unused",
  includeUsage: true,
});
const video = { type: "video_url", video_url: { url: asked.clip_url } };
const messages = [
  {
    role: "user",
    content: [
      { type: "text", text: "video", providerOptions: { openaiCompatible: video } },
      { type: "text", text: QUESTION },
    ],
  },
];
const common = { model: provider("fast"), messages, temperature: 0, maxOutputTokens: 4, maxRetries: 0 };

const answer = await generateText(common);
const stream = streamText(common);
const streamed = await stream.text;
const streamedUsage = await stream.usage;
let error;
try {
  await generateText({ ...common, providerOptions: { aot: { aot: { retention: 0.9 } } } });
} catch (caught) {
  error = { status: caught.statusCode, ...JSON.parse(caught.responseBody).error };
}
const leaving = new AbortController();
const endless = streamText({
  ...common,
  maxOutputTokens: ENDLESS,
  providerOptions: { aot: { ignore_eos: true } },
  abortSignal: leaving.signal,
});
for await (const _ of endless.textStream) {
  break;
}
leaving.abort();
await waitForTheVerdict({
  text: answer.text,
  prompt_tokens: answer.usage.inputTokens,
  streamed,
  streamed_prompt_tokens: streamedUsage.inputTokens,
  video_tokens: answer.usage.raw?.video_tokens,
  streamed_video_tokens: streamedUsage.raw?.video_tokens,
  error,
});
