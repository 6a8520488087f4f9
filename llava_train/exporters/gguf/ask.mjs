// Ask llama.cpp one question, through the npm package @fugood/llama.node: node ask.mjs JOB.json ANSWER.json
//
// JOB: {modules, model, mmproj, prompt, picture?, question?, tokens, probabilities}; `prompt` has <__media__> for a
// picture and no BOS, which llama.cpp adds; `question` is also put through the file's chat template. ANSWER: {ids, chat,
// text, probabilities: [[text, probability], ...] of the first token}. One process a question: a context that is used
// again takes a picture for the one before, and one that is released takes the process with it now and then.
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'

const job = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
const { loadModel } = createRequire(path.join(path.resolve(job.modules), 'any.js'))('@fugood/llama.node')
const context = await loadModel({
  model: job.model, n_ctx: 1024, n_parallel: 1, n_threads: 1, n_gpu_layers: 0,
  flash_attn_type: 'off', cache_type_k: 'f32', cache_type_v: 'f32',
})
if (!context.initMultimodal({ path: job.mmproj, use_gpu: false })) throw new Error('mmproj.gguf cannot be loaded')
const ids = [...(await context.tokenize(job.prompt)).tokens]
const messages = [{ role: 'user', content: job.question }]
const chat = job.question ? context.getFormattedChat(messages, undefined, { jinja: true }).prompt : null
const out = await context.completion({
  prompt: job.prompt, media_paths: job.picture ? [job.picture] : undefined, n_predict: job.tokens,
  n_probs: job.probabilities, temperature: job.probabilities ? 1 : 0, seed: 1,
  top_k: 0, top_p: 1, min_p: 0, penalty_repeat: 1, stop: [],
})
const first = (out.completion_probabilities ?? [])[0]
const probabilities = first ? first.probs.map((p) => [p.tok_str, p.prob]) : []
fs.writeFileSync(process.argv[3], JSON.stringify({ ids, chat, text: out.text, probabilities }))
process.exit(0)
