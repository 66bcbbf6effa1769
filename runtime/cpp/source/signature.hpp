// Ed25519 signatures of a bundle's manifest, as in runtime/bundle/signature.py.
#pragma once

#include "json.hpp"
#include "sha256.hpp"

#ifdef U2MOE_SIGNATURES
#include <openssl/evp.h>
#endif

namespace u2moe::runtime {

constexpr const char* kSignatureFile = "bundle.sig";
/// The signed message is this prefix, followed by the manifest.
constexpr const char* kSignaturePrefix = "u2moe bundle signature 1\n";

/// Decode Base64. Return false if the text is not valid.
inline bool decode_base64(const std::string& text, std::string& bytes) {
  static const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const std::size_t size = std::min(text.find('='), text.size());
  if (text.size() % 4 != 0 || text.size() - size > 2 || text.find_first_not_of('=', size) != std::string::npos) return false;
  unsigned value = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const std::size_t letter = letters.find(text[i]);
    if (letter == std::string::npos) return false;
    value = value << 6 | static_cast<unsigned>(letter);
    if (i % 4 > 0) bytes += static_cast<char>(value >> (6 - i % 4 * 2) & 255U);
  }
  return true;
}

/// Return the 32 bytes of a public key in PEM, as written by `openssl pkey -pubout`.
/// @throws InvalidArgument if `pem` is not an Ed25519 public key.
inline std::string public_key(const std::string& pem) {
  std::string rest = pem, key;
  rest.erase(std::remove_if(rest.begin(), rest.end(), [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }), rest.end());
  const std::string begin = "-----BEGINPUBLICKEY-----MCowBQYDK2VwAyEA", end = "-----ENDPUBLICKEY-----";  // RFC 8410
  const bool is_key = rest.size() == begin.size() + 44 + end.size() && rest.compare(0, begin.size(), begin) == 0 &&
                      rest.compare(begin.size() + 44, end.size(), end) == 0 && decode_base64(rest.substr(begin.size(), 44), key);
  if (!is_key || key.size() != 32) fail<InvalidArgument>("a public key must be Ed25519 in PEM, as 'openssl pkey -pubout' writes it");
  return key;
}

/// Those signatures of a bundle that were made with accepted keys.
class Signatures {
 public:
  /// A public key (32 bytes) and the signature made with its private key.
  using Signed = std::pair<std::string, std::string>;
  /// Whether the signature of a message is valid.
  using Verify = std::function<bool(const Signed&, const std::string& message)>;

  /// @param content content of the signature file.
  /// @param path path of that file, for messages.
  /// @throws SignatureError if the file is damaged, or has no signature by an accepted key.
  /// @throws InvalidArgument if a key is invalid, or the list of keys is empty.
  Signatures(const std::string& content, const std::vector<std::string>& public_keys, std::string path) : path_(std::move(path)) {
    const Json json = Json::parse(content, path_);
    if (json["format"].string() != "u2moe-signature") json["format"].fail("'u2moe-signature'");
    if (json["version"].number() != 1) json["version"].fail("1");
    if (public_keys.empty()) fail<InvalidArgument>("public_keys must contain at least one key");
    std::string expected;
    for (const std::string& pem : public_keys) {
      const std::string key = public_key(pem), id = hex_of(sha256(key).substr(0, 16));
      expected += (expected.empty() ? "" : " or ") + id;
      if (!json["signatures"].has(id)) continue;
      std::string signature;
      if (!decode_base64(json["signatures"][id].string(), signature)) json["signatures"][id].fail("Base64");
      signed_.emplace_back(key, signature);
    }
    const std::string found = joined(json["signatures"].object(), ", ", [](const auto& each) { return each.first; });
    if (signed_.empty()) fail<SignatureError>(path_ + ": is signed by " + (found.empty() ? "nobody" : found) + ", expected " + expected);
  }

  /// The signatures stored for accepted keys. They are not yet verified.
  const std::vector<Signed>& by_demanded() const { return signed_; }

  /// @throws SignatureError if no signature matches the manifest.
  void check(const std::string& manifest, const Verify& verify) const {
    const std::string message = kSignaturePrefix + manifest;
    const bool is_signed = std::any_of(signed_.begin(), signed_.end(), [&](const Signed& each) { return each.second.size() == 64 && verify(each, message); });
    if (!is_signed) fail<SignatureError>(path_ + ": does not match this bundle.json, which was changed or belongs to another bundle");
  }

 private:
  std::string path_;
  std::vector<Signed> signed_;
};

/// The accepted public keys in PEM, and the function that verifies signatures.
struct Demanded {
  std::vector<std::string> public_keys;
  Signatures::Verify verify;
};

/// Return the function that verifies signatures with OpenSSL.
/// @throws SignatureError if the library was built without OpenSSL.
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
  fail<SignatureError>("this library was built without OpenSSL: build it with -DU2MOE_SIGNATURES=ON, or set verify_signature");
#endif
}

}  // namespace u2moe::runtime
