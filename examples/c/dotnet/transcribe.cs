// Recognise 16-bit mono samples from standard input: transcribe.exe BUNDLE RATE < samples
// Compile with mcs transcribe.cs U2moe.cs, or the same files with .NET.
using System;
using System.Globalization;
using System.IO;
using System.Text;
using System.Threading;
using U2moe;

static class Program {
  static void Transcribe(string folder, int rate, byte[] bytes) {
    using (var recognizer = new Recognizer(folder))
    using (var transcriber = new Transcriber(recognizer)) {
      transcriber.Partial += result => Console.Error.WriteLine(result.Text);
      transcriber.Final += result =>
        Console.WriteLine(string.Format(CultureInfo.InvariantCulture, "{0:F2} {1:F2} {2}", result.Start, result.End, result.Text));
      for (var begin = 0; begin + 1 < bytes.Length;) {
        var samples = new short[Math.Min(160, (bytes.Length - begin) / 2)];
        Buffer.BlockCopy(bytes, begin, samples, 0, 2 * samples.Length);
        try {
          transcriber.Feed(rate, samples);
          begin += 2 * samples.Length;
        } catch (U2moeException error) {
          if (error.Code != U2moeException.QueueFull) throw;
          Thread.Sleep(10);  // a program with a microphone would drop these samples
        }
      }
      transcriber.Wait();
    }
  }

  static int Main(string[] arguments) {
    Console.OutputEncoding = new UTF8Encoding(false);
    var samples = new MemoryStream();
    Console.OpenStandardInput().CopyTo(samples);
    try {
      Transcribe(arguments[0], int.Parse(arguments[1]), samples.ToArray());
      return 0;
    } catch (U2moeException error) {
      Console.Error.WriteLine(error.Name + ": " + error.Message);
      return 1;
    }
  }
}
