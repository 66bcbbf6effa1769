// Recognise 16-bit mono samples from standard input: java Transcribe.java LIBRARY BUNDLE RATE < samples
// Uses foreign functions, without JNI. Needs Java 22 and --enable-native-access=ALL-UNNAMED.
import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_DOUBLE;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.io.PrintStream;
import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Locale;

class Transcribe {
  static final Linker linker = Linker.nativeLinker();
  static SymbolLookup library;

  static String text(MemorySegment pointer) {
    return pointer.reinterpret(Long.MAX_VALUE).getString(0);
  }

  /** Call a function with numbers and pointers that returns an error code. */
  static void call(String name, Object... arguments) throws Throwable {
    MemoryLayout[] layouts = Arrays.stream(arguments)
        .map(each -> each instanceof MemorySegment ? ADDRESS : each instanceof Long ? JAVA_LONG : JAVA_INT)
        .toArray(MemoryLayout[]::new);
    var function = linker.downcallHandle(library.find(name).orElseThrow(), FunctionDescriptor.of(JAVA_INT, layouts));
    if ((int) function.invokeWithArguments(arguments) == 0) return;
    var message = linker.downcallHandle(library.find("u2moe_error_message").orElseThrow(), FunctionDescriptor.of(ADDRESS));
    System.err.println(text((MemorySegment) message.invoke()));
    System.exit(1);
  }

  public static void main(String[] arguments) throws Throwable {
    try (Arena arena = Arena.ofConfined()) {
      library = SymbolLookup.libraryLookup(Path.of(arguments[0]), arena);
      byte[] samples = System.in.readAllBytes();
      var out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
      MemorySegment handle = arena.allocate(ADDRESS), content = arena.allocate(Math.max(samples.length, 2), 2);
      MemorySegment view = arena.allocate(112, 8), none = MemorySegment.NULL; // a u2moe_result_view
      MemorySegment.copy(samples, 0, content, java.lang.foreign.ValueLayout.JAVA_BYTE, 0, samples.length);
      call("u2moe_recognizer_open", arena.allocateFrom(arguments[1]), none, handle);
      MemorySegment recognizer = handle.get(ADDRESS, 0);
      call("u2moe_stream_create", recognizer, none, handle);
      MemorySegment stream = handle.get(ADDRESS, 0);
      int rate = Integer.parseInt(arguments[2]);
      for (long begin = 0; begin < samples.length / 2; begin += rate) { // another thread could feed while this one decodes
        call("u2moe_stream_feed_int16", stream, rate, content.asSlice(2 * begin), Math.min(rate, samples.length / 2 - begin));
        call("u2moe_decode_streams", handle, 1L);
      }
      call("u2moe_stream_feed_finished", stream);
      call("u2moe_decode_streams", handle, 1L);
      while (true) {
        call("u2moe_stream_take_segment", stream, handle);
        MemorySegment result = handle.get(ADDRESS, 0);
        if (result.address() == 0) break;
        view.set(JAVA_LONG, 0, view.byteSize());
        call("u2moe_result_get", result, view);
        out.println(String.format(Locale.ROOT, "%.2f %.2f %s", view.get(JAVA_DOUBLE, 24), view.get(JAVA_DOUBLE, 32),
            text(view.get(ADDRESS, 8))));
        call("u2moe_result_free", result);
      }
      call("u2moe_stream_free", stream);
      call("u2moe_recognizer_free", recognizer);
    }
  }
}
