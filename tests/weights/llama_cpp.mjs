// Asks llama.cpp (by node-llama-cpp, where it is installed) about a GGUF file.
//   node llama_cpp.mjs MODEL.gguf '{"prompts": [[...], ...], "chat": [...], "stop": [...], "text": "...", "most": 32}'
// Prints {"top": the five most likely tokens after each prompt with their probabilities, "answer": the greedy text after
// `chat` up to a stop id, "tokens": llama.cpp's ids of `text`}.
import {createRequire} from "node:module";
import {availableParallelism} from "node:os";
import {pathToFileURL} from "node:url";

const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [modelPath, request] = process.argv.slice(2);
const {prompts, chat, stop, text, most = 32} = JSON.parse(request);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512, threads: availableParallelism()});
const sequence = context.getSequence();

async function next(tokens) {
  const last = [tokens.at(-1), {generateNext: {probabilities: true, token: true, options: {temperature: 0}}}];
  const out = await sequence.controlledEvaluate([...tokens.slice(0, -1), last]);
  return out.at(-1).next;
}

const top = [];
for (const ids of prompts) {
  await sequence.clearHistory();
  top.push([...(await next(ids)).probabilities.entries()].sort((a, b) => b[1] - a[1]).slice(0, 5));
}
await sequence.clearHistory();
const answer = [];
let {token} = await next(chat);
while (!stop.includes(token) && answer.length < most) {
  answer.push(token);
  ({token} = await next([token]));
}
console.log(JSON.stringify({top, answer: model.detokenize(answer), tokens: model.tokenize(text)}));
process.exit(0);
