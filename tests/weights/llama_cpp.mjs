// Asks llama.cpp (by node-llama-cpp, where it is installed) about a GGUF file.
//   node llama_cpp.mjs MODEL.gguf '{"ids": [...], "prompt": [...], "stop": [...], "text": "..."}'
// Prints {"top": the five most likely tokens after `ids` with their probabilities, "answer": the greedy text after
// `prompt` up to a stop id, "tokens": llama.cpp's ids of `text`}.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [modelPath, request] = process.argv.slice(2);
const {ids, prompt, stop, text} = JSON.parse(request);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512});
const sequence = context.getSequence();

async function next(tokens) {
  await sequence.clearHistory();
  const last = [tokens.at(-1), {generateNext: {probabilities: true, token: true, options: {temperature: 0}}}];
  const out = await sequence.controlledEvaluate([...tokens.slice(0, -1), last]);
  return out.at(-1).next;
}

const top = [...(await next(ids)).probabilities.entries()].sort((a, b) => b[1] - a[1]).slice(0, 5);
const answer = [];
for (let i = 0; i < 32; i++) {
  const {token} = await next([...prompt, ...answer]);
  if (stop.includes(token)) break;
  answer.push(token);
}
console.log(JSON.stringify({top, answer: model.detokenize(answer), tokens: model.tokenize(text)}));
process.exit(0);
