// Plays batches of calls of the peer's SDK: a line of JSON in, the nanoseconds
// of the batch out. The operations are those of ours.go.
import { createInterface } from "node:readline";
import { Volume } from "microsandbox";

const small = Buffer.alloc(4096, 0x61);
const large = Buffer.alloc(256 << 20, 0x62);
let fs, next = 0, made = [];

const ops = {
  setup: async () => {
    fs = (await Volume.builder("files").create()).fs();
    await fs.write("/small", small);
    await fs.write("/large", large);
    await fs.mkdir("/many");
  },
  "fill volumes": async (n) => { for (let i = 0; i < n; i++) await Volume.builder("v" + i).create(); },
  create: async (n) => { for (let i = 0; i < n; i++) { const k = "c" + next++; made.push(k); await Volume.builder(k).create(); } },
  "create 8": async (n) => {
    for (let i = 0; i < n; i += 8) {
      const ks = Array.from({ length: 8 }, () => "c" + next++);
      made.push(...ks);
      await Promise.all(ks.map((k) => Volume.builder(k).create()));
    }
  },
  remove: async () => { for (const k of made.splice(0)) await Volume.remove(k); },
  get: async (n) => { for (let i = 0; i < n; i++) await Volume.get("v7"); },
  list: async (n) => { for (let i = 0; i < n; i++) await Volume.list(); },
  read: async (n) => { for (let i = 0; i < n; i++) await fs.read("/small"); },
  overwrite: async (n) => { for (let i = 0; i < n; i++) await fs.write("/small", small); },
  "write new": async (n) => { for (let i = 0; i < n; i++) await fs.write("/many/n" + next++, small); },
  stat: async (n) => { for (let i = 0; i < n; i++) await fs.stat("/small"); },
  exists: async (n) => { for (let i = 0; i < n; i++) await fs.exists("/small"); },
  mkdir: async (n) => { for (let i = 0; i < n; i++) await fs.mkdir("/many/d" + next++); },
  rename: async (n) => { for (let i = 0; i < n; i += 2) { await fs.rename("/small", "/moved"); await fs.rename("/moved", "/small"); } },
  "list 10k": async (n) => { for (let i = 0; i < n; i++) await fs.list("/listed"); },
  "read stream": recvAll,
  "read chunks": recvAll,
  "write stream 64K": () => stream(64 << 10),
  "write stream 1M": () => stream(1 << 20),
  "read whole": async () => { await fs.read("/large"); },
  "write whole": async () => { await fs.write("/whole", large); },
  copy: async () => { await fs.copy("/large", "/copy"); },
};

async function recvAll() {
  const s = await fs.readStream("/large");
  while ((await s.recv()) !== null);
}

async function stream(chunk) {
  const s = await fs.writeStream("/stream");
  for (let off = 0; off < large.length; off += chunk) await s.write(large.subarray(off, off + chunk));
  await s.close();
}

for await (const line of createInterface({ input: process.stdin })) {
  const { op, n } = JSON.parse(line);
  let answer;
  try {
    const start = process.hrtime.bigint();
    await ops[op](n);
    answer = { ns: Number(process.hrtime.bigint() - start) };
  } catch (e) {
    answer = { error: String(e) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
