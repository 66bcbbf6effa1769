// The recogniser, in a thread of its own.

import * as ort from './ort/ort.wasm.bundle.min.mjs';
import { serve } from './u2moe/worker.js';

ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send, and gain nothing for chunks this small
ort.env.wasm.wasmPaths = { wasm: new URL('./ort/ort-wasm-simd-threaded.wasm', import.meta.url).href };
serve({ ort });
