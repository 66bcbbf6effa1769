/** Cancels long operations by an AbortSignal. */

/** The signal of a program, or undefined. */
export function checkedSignal(signal) {
  if (signal === undefined || signal === null) return undefined;
  if (typeof signal.throwIfAborted !== 'function') throw new TypeError(`signal must be an AbortSignal, got ${signal}`);
  return signal;
}

/**
 * The work's result or error; or the signal's reason as soon as it is aborted, since onnxruntime cannot be interrupted.
 *
 * @param work a promise.
 * @param cancel called once when the signal is aborted before the work has ended.
 */
export async function untilAborted(work, signal, cancel) {
  if (!signal) return work;
  let abort;
  const aborted = new Promise((_, reject) => { abort = () => { reject(signal.reason); cancel(); }; });
  signal.addEventListener('abort', abort, { once: true });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener('abort', abort); // a signal may live longer than many calls
  }
}
