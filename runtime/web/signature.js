/** Whether a bundle is signed by a key that a program demands; what is signed, and how, is told by the core. */

import { SignatureError } from './errors.js';

/**
 * @param content of the signature file. @param manifest the bytes of bundle.json. @param publicKeys in PEM.
 * @param verify whether a signature of a message is by a key.
 * @throws SignatureError none of the keys has signed the manifest.
 */
export async function checkSignature(core, content, manifest, publicKeys, verify = withWebCrypto) {
  if (!Array.isArray(publicKeys)) throw new RangeError('publicKeys must be a list of keys in PEM');
  const { prefix, signed } = JSON.parse(core.text(core.call('signatures', content, JSON.stringify(publicKeys))));
  const message = new Uint8Array([...new TextEncoder().encode(prefix), ...manifest]);
  for (const each of signed) {
    const [publicKey, signature] = each.map((hex) => Uint8Array.from(hex.match(/../g) ?? [], (byte) => Number.parseInt(byte, 16)));
    if ((await verify({ publicKey, message, signature })) === true) return;
  }
  throw new SignatureError('bundle.sig: is not of this bundle.json, which was changed, or is of another bundle');
}

async function withWebCrypto({ publicKey, message, signature }) {
  try {
    const key = await crypto.subtle.importKey('raw', publicKey, 'Ed25519', false, ['verify']);
    return await crypto.subtle.verify('Ed25519', key, signature, message);
  } catch (cause) {
    throw new SignatureError('bundle.sig: WebCrypto has no Ed25519 here: give a function verify', { cause });
  }
}
