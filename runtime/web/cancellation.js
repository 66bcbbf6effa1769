/** Cancels long operations by an AbortSignal. */

/**
 * What `start` gives a promise of, or the signal's reason as soon as it is aborted, since onnxruntime cannot be interrupted.
 *
 * @param signal of the program; undefined or null: there is none. If it is aborted, nothing is started.
 * @param cancel called once with the promise when the signal is aborted before the work has ended.
 */
export async function untilAborted(signal, start, cancel) {
  if (signal === undefined || signal === null) return start();
  if (typeof signal.throwIfAborted !== 'function') throw new TypeError(`signal must be an AbortSignal, got ${signal}`);
  signal.throwIfAborted();
  const work = start();
  return new Promise((resolve, reject) => {
    const abort = () => { reject(signal.reason); cancel(work); };
    signal.addEventListener('abort', abort, { once: true });
    work.finally(() => signal.removeEventListener('abort', abort)).then(resolve, reject); // it may live longer than many calls
  });
}
