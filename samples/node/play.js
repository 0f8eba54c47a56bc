// A video of a swiftvideo server whose prompt changes while it plays, from the .proto alone. It goes on after a cut.
//
// node play.js --out story.h264 "a red circle moving right at night" "a blue cross bouncing at dawn@6"
//
// PROMPT@CHUNK is known ahead and takes over with that chunk; lines that are typed meanwhile are further prompts, and
// Ctrl-C stops. --server, --token, --root (PEM), --encoding (raw, jpeg, h264), --seed and --chunks are as in `swiftvideo`.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const { createInterface } = require("node:readline");
const { randomUUID } = require("node:crypto");
const { parseArgs } = require("node:util");
const { setTimeout: sleep } = require("node:timers/promises");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const CREDITS = 3; // chunks that the server makes ahead of the last one written
const PATIENCE = 30_000; // milliseconds that reattaching is tried, and that the session waits for it
const KEPT = 64; // prompts that are said again in a reattach

const string = (value) => ({ type: "string", default: value });
const { values: option, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    server: string("localhost:50051"), token: string(process.env.SWIFTVIDEO_TOKEN ?? ""), root: string(""),
    out: string("video.h264"), encoding: string("h264"), seed: string("0"), chunks: string("20"),
    protos: string(path.join(__dirname, "../../protos")),
  },
});

const definition = loader.loadSync("swiftvideo/v1/generation.proto", {
  includeDirs: [option.protos], enums: String, oneofs: true, defaults: true,
  longs: String, // numbers are doubles here, and would round a seed of 64 bits
});
const { GenerationService } = grpc.loadPackageDefinition(definition).swiftvideo.v1;
const { createSsl, createInsecure } = grpc.credentials;
const local = /^(localhost|127\.|\[::1\])/.test(option.server); // a token leaves this machine under TLS alone
const roots = option.root ? fs.readFileSync(option.root) : null;
const client = new GenerationService(option.server, roots || !local ? createSsl(roots) : createInsecure(), {
  "grpc.max_receive_message_length": -1, // a chunk of raw frames is larger than the 4 MiB that are usual
  "grpc.keepalive_time_ms": 20_000, // a network that went silent; more often than every 5 s the server hangs up
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.initial_reconnect_backoff_ms": 100,
  "grpc.max_reconnect_backoff_ms": 2_000,
});
const metadata = new grpc.Metadata();
if (option.token) metadata.set("authorization", `Bearer ${option.token}`);

const out = fs.openSync(option.out, "w");
const prompts = new Map(); // by id, in the order of asking
let session = null; // `started`
let next = 0; // first chunk that was not received
let ended = null;
let broke = null; // when the outage began that is under way
let call = null;

function ask(text, atChunk = 0) {
  const prompt = { id: randomUUID(), text: text.toWellFormed(), atChunk }; // half an emoji would end the session
  prompts.set(prompt.id, prompt);
  return prompt;
}

function opening() {
  if (!session) return [{ start }];
  const order = ({ number }) => number ?? Number.MAX_SAFE_INTEGER; // those that were never accepted come last
  const again = [...prompts.values()].sort((one, other) => order(one) - order(other));
  const reattach = {
    resumeToken: session.resumeToken,
    nextChunk: next,
    prompts: again.slice(-KEPT).map((prompt) => ({ ...prompt, heardChunk: prompt.heardChunk ?? next })),
  };
  return [{ reattach }, { resume: {} }];
}

function take(response) {
  const kind = response.message;
  const message = response[kind];
  broke = null;
  if (kind === "started") {
    session = message;
    console.log(`${message.resumed ? "resumed" : "started"} ${message.sessionId} at chunk ${message.nextChunk}`);
  } else if (kind === "chunk") {
    for (const payload of message.payloads) fs.writeSync(out, payload);
    next = Number(message.index) + 1;
    const text = prompts.get(message.promptId)?.text;
    console.log(`chunk ${message.index}` + (message.mode && ` switches to "${text}": ${message.mode}`));
    call.write({ credit: { presentedChunk: message.index } });
  } else if (kind === "promptAccepted") {
    const prompt = prompts.get(message.id);
    prompt.number = Number(message.number);
    prompt.heardChunk = message.heardChunk;
    console.log(`accepted "${prompt.text}", heard with chunk ${prompt.heardChunk}`);
  } else if (kind === "promptRejected") {
    prompts.delete(message.id);
    console.log(`rejected: ${message.reason}`);
  } else if (kind === "notice") {
    console.log(message.text);
  } else if (kind === "ended") {
    ended = message;
  }
}

// One call, to its status.
function run() {
  ended = null;
  return new Promise((resolve) => {
    call = client.generate(metadata);
    call.on("data", take);
    call.on("error", () => {}); // the status says the same
    call.on("status", resolve);
    for (const message of opening()) call.write(message);
  });
}

// Milliseconds until a call that ended with `status` is tried again, or null where that is of no use.
function wait(status) {
  broke ??= Date.now();
  if (Date.now() - broke > PATIENCE) return null;
  const hint = status.metadata.get("retry-after-ms")[0];
  if (hint !== undefined) return Number(hint);
  const own = status.metadata.get("grpc-status-details-bin").length > 0; // else a connection broke, whatever the code
  return session && (!own || status.code === grpc.status.UNAVAILABLE) ? 200 : null;
}

const start = {
  prompt: positionals[0] ?? "a red circle moving right at night", seed: option.seed, credits: CREDITS,
  encoding: `ENCODING_${option.encoding.toUpperCase()}`, lingerMs: PATIENCE, chunks: option.chunks,
  prompts: positionals.slice(1).map((known) => ask(known.replace(/@\d+$/, ""), known.match(/@(\d+)$/)?.[1])),
};
const lines = createInterface({ input: process.stdin });
lines.on("line", (text) => call.write({ prompt: ask(text) })); // where the call is broken, the reattach says it again
process.once("SIGINT", () => call.write({ stop: {} }));

(async () => {
  let status, pause;
  for (status = await run(); !ended || ended.resumable; status = await run()) {
    if ((pause = wait(status)) === null) break;
    console.log(`${grpc.status[status.code]} ${status.details}: again in ${pause} ms`);
    await sleep(pause);
  }
  console.log(ended ? ended.text : `${grpc.status[status.code]}: ${status.details}`);
  process.exitCode = ["REASON_STOPPED", "REASON_COMPLETED"].includes(ended?.reason) ? 0 : 1;
  fs.closeSync(out);
  lines.close();
  client.close();
})();
