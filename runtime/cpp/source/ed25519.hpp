// Verifies Ed25519 by OpenSSL, if the library was built with it.
#pragma once

#include "signature.hpp"

#ifdef U2MOE_SIGNATURES
#include <memory>

#include <openssl/evp.h>
#endif

namespace u2moe::runtime {

/// @throws SignatureError the library was built without OpenSSL.
inline Signatures::Verify built_in_verify() {
#ifdef U2MOE_SIGNATURES
  return [](const Signatures::Signed& given, const std::string& message) {
    const auto bytes = [](const std::string& text) { return reinterpret_cast<const unsigned char*>(text.data()); };
    const std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY*)> key(
        EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, nullptr, bytes(given.first), given.first.size()), EVP_PKEY_free);
    const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    return key && context && EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key.get()) == 1 &&
           EVP_DigestVerify(context.get(), bytes(given.second), given.second.size(), bytes(message), message.size()) == 1;
  };
#else
  throw SignatureError("this library was built without OpenSSL: build it with -DU2MOE_SIGNATURES=ON, or give verify_signature");
#endif
}

}  // namespace u2moe::runtime
