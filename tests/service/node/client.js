// A session with two prompt switches, one of them known ahead, from the .proto alone: node client.js ADDRESS PROTO_FOLDER OUT
const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, protos, out] = process.argv.slice(2);
const definition = loader.loadSync("swiftvideo/v1/generation.proto", {
  includeDirs: [protos], longs: Number, enums: String, oneofs: true, defaults: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).swiftvideo.v1;
const client = new GenerationService(address, grpc.credentials.createInsecure());
const call = client.generate();
const seen = [];
const file = fs.openSync(out, "w");

call.on("data", (response) => {
  seen.push(response.message);
  if (response.message === "chunk") {
    const chunk = response.chunk;
    for (const payload of chunk.payloads) fs.writeSync(file, payload);
    if (chunk.index === 1) call.write({ prompt: { id: "second", text: "w9 w10", atChunk: 6 } });
    call.write(chunk.index === 7 ? { stop: {} } : { credit: { presentedChunk: chunk.index } });
  }
});
call.on("error", (error) => { console.error(error.message); process.exit(1); });
call.on("status", (status) => {
  fs.closeSync(file);
  console.log(JSON.stringify({ code: status.code, seen }));
  client.close();
});
const ahead = [{ id: "first", text: "w3 w4", atChunk: 3 }];
call.write({ start: { prompt: "w1 w2", seed: 5, credits: 1, prompts: ahead } });
