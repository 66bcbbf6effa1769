// Recognises samples of 16 bits, one channel, from standard input:  transcribe.exe BUNDLE RATE < samples
// mcs transcribe.cs; the library lies where the system looks (LD_LIBRARY_PATH, PATH). In .NET the same file does.
using System;
using System.Globalization;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;

static class Program {
  [StructLayout(LayoutKind.Sequential)]
  struct View {
    public UIntPtr Size;
    public IntPtr Text;
    public int IsFinal, Segment;
    public double Start, End, Confidence;
    public IntPtr Tokens, Times;
    public UIntPtr NumTokens, NumTimes;
    public IntPtr Words;
    public UIntPtr NumWords;
    public IntPtr Nbest;
    public UIntPtr NumNbest;
  }

  [DllImport("u2moe")] static extern IntPtr u2moe_error_message();
  [DllImport("u2moe")] static extern int u2moe_recognizer_open(byte[] folder, IntPtr options, out IntPtr recognizer);
  [DllImport("u2moe")] static extern int u2moe_recognizer_free(IntPtr recognizer);
  [DllImport("u2moe")] static extern int u2moe_stream_create(IntPtr recognizer, IntPtr options, out IntPtr stream);
  [DllImport("u2moe")] static extern int u2moe_stream_accept_waveform_int16(IntPtr stream, int rate, byte[] samples, UIntPtr num);
  [DllImport("u2moe")] static extern int u2moe_stream_input_finished(IntPtr stream);
  [DllImport("u2moe")] static extern int u2moe_stream_take_segment(IntPtr stream, out IntPtr result);
  [DllImport("u2moe")] static extern int u2moe_stream_free(IntPtr stream);
  [DllImport("u2moe")] static extern int u2moe_result_get(IntPtr result, ref View view);
  [DllImport("u2moe")] static extern int u2moe_result_free(IntPtr result);

  static string Utf8(IntPtr text) {
    var length = 0;
    while (Marshal.ReadByte(text, length) != 0) ++length;
    var bytes = new byte[length];
    Marshal.Copy(text, bytes, 0, length);
    return Encoding.UTF8.GetString(bytes);
  }

  static void Check(int error) {
    if (error == 0) return;
    Console.Error.WriteLine(Utf8(u2moe_error_message()));
    Environment.Exit(1);
  }

  static void Main(string[] arguments) {
    Console.OutputEncoding = new UTF8Encoding(false);
    var samples = new MemoryStream();
    Console.OpenStandardInput().CopyTo(samples);
    IntPtr recognizer, stream, result;
    Check(u2moe_recognizer_open(Encoding.UTF8.GetBytes(arguments[0] + "\0"), IntPtr.Zero, out recognizer));
    Check(u2moe_stream_create(recognizer, IntPtr.Zero, out stream));
    Check(u2moe_stream_accept_waveform_int16(stream, int.Parse(arguments[1]), samples.ToArray(), (UIntPtr)(samples.Length / 2)));
    Check(u2moe_stream_input_finished(stream));
    for (;;) {
      Check(u2moe_stream_take_segment(stream, out result));
      if (result == IntPtr.Zero) break;
      var view = new View { Size = (UIntPtr)Marshal.SizeOf(typeof(View)) };
      Check(u2moe_result_get(result, ref view));
      Console.WriteLine(string.Format(CultureInfo.InvariantCulture, "{0:F2} {1:F2} {2}", view.Start, view.End, Utf8(view.Text)));
      Check(u2moe_result_free(result));
    }
    Check(u2moe_stream_free(stream));
    Check(u2moe_recognizer_free(recognizer));
  }
}
