// Asks llama.cpp (by node-llama-cpp, where it is installed) for the ids of texts.
//   node llama_cpp_tokens.mjs REQUEST.json ANSWERS.json
// The request is {"FILE.gguf": {"texts": [...], "special": false}, ...}.
// The answers are {"FILE.gguf": [ids of each text], ...}; with "special", control tokens in the texts are recognized.
import {createRequire} from "node:module";
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const answers = {};
for (const [modelPath, {texts, special}] of Object.entries(JSON.parse(readFileSync(process.argv[2])))) {
  const model = await llama.loadModel({modelPath, vocabOnly: true});
  answers[modelPath] = texts.map((text) => [...model.tokenize(text, special, "trimLeadingSpace")]);
  await model.dispose();
}
writeFileSync(process.argv[3], JSON.stringify(answers));
process.exit(0);
