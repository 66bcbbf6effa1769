// Recognise 16-bit mono samples from standard input: transcribe BUNDLE RATE < samples
// Untested, because Debian has no Swift package. See module.modulemap.
import Foundation
import U2moe

func check(_ error: u2moe_error) {
  guard error != U2MOE_OK else { return }
  FileHandle.standardError.write(String(cString: u2moe_error_message()).data(using: .utf8)!)
  exit(1)
}

let samples = FileHandle.standardInput.readDataToEndOfFile()
var recognizer: u2moe_recognizer?
var stream: u2moe_stream?
check(u2moe_recognizer_open(CommandLine.arguments[1], nil, &recognizer))
check(u2moe_stream_create(recognizer, nil, &stream))
let rate = Int(CommandLine.arguments[2])!
samples.withUnsafeBytes { bytes in
  let pointer = bytes.bindMemory(to: Int16.self)
  for begin in stride(from: 0, to: pointer.count, by: rate) {  // another thread could feed while this one decodes
    let part = UnsafeBufferPointer(rebasing: pointer[begin..<min(begin + rate, pointer.count)])
    check(u2moe_stream_feed_int16(stream, Int32(rate), part.baseAddress, part.count))
    check(u2moe_decode_streams(&stream, 1))
  }
}
check(u2moe_stream_feed_finished(stream))
check(u2moe_decode_streams(&stream, 1))
while true {
  var result: u2moe_result?
  check(u2moe_stream_take_segment(stream, &result))
  if result == nil { break }
  var view = u2moe_result_view()
  view.size = MemoryLayout<u2moe_result_view>.size
  check(u2moe_result_get(result, &view))
  print(String(format: "%.2f %.2f %@", view.start, view.end, String(cString: view.text)))
  check(u2moe_result_free(result))
}
check(u2moe_stream_free(stream))
check(u2moe_recognizer_free(recognizer))
