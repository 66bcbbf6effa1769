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
export function untilAborted(work, signal, cancel) {
  if (!signal) return work;
  return new Promise((resolve, reject) => {
    const abort = () => { reject(signal.reason); cancel(); };
    signal.addEventListener('abort', abort, { once: true });
    work.finally(() => signal.removeEventListener('abort', abort)).then(resolve, reject); // it may live longer than many calls
  });
}
