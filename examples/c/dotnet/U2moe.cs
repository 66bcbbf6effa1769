// Speech recognition with a u2moe bundle. Loads the library u2moe from the system's search path (LD_LIBRARY_PATH, PATH) or from
// the NuGet package. u2moe.h documents each function and the rules for threads.
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;

namespace U2moe {
  static class Native {
    const string Library = "u2moe";

    [StructLayout(LayoutKind.Sequential)]
    internal struct View {
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
      public double Score;
      public IntPtr NbestTimes;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct WordView {
      public IntPtr Text;
      public double Start, End, Confidence;
    }

    [UnmanagedFunctionPointer(CallingConvention.Cdecl)] internal delegate void OnResult(IntPtr context, IntPtr result);
    [UnmanagedFunctionPointer(CallingConvention.Cdecl)] internal delegate void OnError(IntPtr context, int error, IntPtr message);
    [UnmanagedFunctionPointer(CallingConvention.Cdecl)] internal delegate void OnSpeech(IntPtr context, int isSpeech, double time);

    [StructLayout(LayoutKind.Sequential)]
    internal struct Callbacks {
      public UIntPtr Size;
      public IntPtr Context;
      public OnResult OnPartial, OnFinal;
      public OnError OnError;
      public OnSpeech OnSpeech;
    }

    [DllImport(Library)] internal static extern IntPtr u2moe_error_message();
    [DllImport(Library)] internal static extern IntPtr u2moe_error_name(int error);
    [DllImport(Library)] internal static extern int u2moe_recognizer_open(byte[] folder, IntPtr options, out IntPtr recognizer);
    [DllImport(Library)] internal static extern int u2moe_recognizer_free(IntPtr recognizer);
    [DllImport(Library)] internal static extern int u2moe_stream_create(IntPtr recognizer, IntPtr options, out IntPtr stream);
    [DllImport(Library)] internal static extern int u2moe_stream_feed_int16(IntPtr stream, int rate, short[] samples, UIntPtr num);
    [DllImport(Library)] internal static extern int u2moe_stream_feed_finished(IntPtr stream);
    [DllImport(Library)] internal static extern int u2moe_decode_streams(IntPtr[] streams, UIntPtr num);
    [DllImport(Library)] internal static extern int u2moe_stream_cancel(IntPtr stream);
    [DllImport(Library)] internal static extern int u2moe_stream_take_segment(IntPtr stream, out IntPtr result);
    [DllImport(Library)] internal static extern int u2moe_stream_free(IntPtr stream);
    [DllImport(Library)] internal static extern int u2moe_transcriber_create(IntPtr recognizer, IntPtr options, ref Callbacks callbacks, out IntPtr transcriber);
    [DllImport(Library)] internal static extern int u2moe_transcriber_feed_int16(IntPtr transcriber, int rate, short[] samples, UIntPtr num);
    [DllImport(Library)] internal static extern int u2moe_transcriber_wait(IntPtr transcriber);
    [DllImport(Library)] internal static extern int u2moe_transcriber_cancel(IntPtr transcriber);
    [DllImport(Library)] internal static extern int u2moe_transcriber_free(IntPtr transcriber);
    [DllImport(Library)] internal static extern int u2moe_result_get(IntPtr result, ref View view);
    [DllImport(Library)] internal static extern int u2moe_result_free(IntPtr result);

    internal static string Utf8(IntPtr text) {
      var length = 0;
      while (Marshal.ReadByte(text, length) != 0) ++length;
      var bytes = new byte[length];
      Marshal.Copy(text, bytes, 0, length);
      return Encoding.UTF8.GetString(bytes);
    }

    internal static void Check(int error) {
      if (error != 0) throw new U2moeException(error, Utf8(u2moe_error_message()));
    }
  }

  /// An error of the library. `Name` is the name of the error code in u2moe.h.
  public class U2moeException : Exception {
    public const int QueueFull = 12, Cancelled = 13;
    public U2moeException(int code, string message) : base(message) { Code = code; }
    public int Code { get; private set; }
    public string Name { get { return Native.Utf8(Native.u2moe_error_name(Code)); } }
  }

  public class Word {
    public string Text;
    public double Start, End, Confidence;
  }

  /// Partial or final result of an utterance, with times in seconds after the first sample of the source.
  public class Result {
    public string Text;
    public bool IsFinal;
    public int Segment;
    public double Start, End, Confidence, Score;
    public List<Word> Words = new List<Word>();

    internal static Result Of(IntPtr handle) {
      var view = new Native.View { Size = (UIntPtr)Marshal.SizeOf(typeof(Native.View)) };
      Native.Check(Native.u2moe_result_get(handle, ref view));
      var result = new Result {
        Text = Native.Utf8(view.Text), IsFinal = view.IsFinal != 0, Segment = view.Segment, Start = view.Start, End = view.End,
        Confidence = view.Confidence, Score = view.Score };
      var size = Marshal.SizeOf(typeof(Native.WordView));
      for (var i = 0; i < (int)view.NumWords; ++i) {
        var word = (Native.WordView)Marshal.PtrToStructure(view.Words + i * size, typeof(Native.WordView));
        result.Words.Add(new Word { Text = Native.Utf8(word.Text), Start = word.Start, End = word.End, Confidence = word.Confidence });
      }
      return result;
    }
  }

  /// A loaded bundle. Threads may share it.
  public sealed class Recognizer : IDisposable {
    internal IntPtr Handle;
    public Recognizer(string folder) { Native.Check(Native.u2moe_recognizer_open(Encoding.UTF8.GetBytes(folder + "\0"), IntPtr.Zero, out Handle)); }
    public Stream CreateStream() { return new Stream(this); }
    public void Dispose() { Native.u2moe_recognizer_free(Handle); }
  }

  /// A stream of one audio source. Any thread may feed it. `Decode` recognises the audio.
  public sealed class Stream : IDisposable {
    readonly IntPtr handle;
    internal Stream(Recognizer recognizer) { Native.Check(Native.u2moe_stream_create(recognizer.Handle, IntPtr.Zero, out handle)); }
    /// Queue mono samples and return.
    public void Feed(int rate, short[] samples) { Native.Check(Native.u2moe_stream_feed_int16(handle, rate, samples, (UIntPtr)samples.Length)); }
    public void Finish() { Native.Check(Native.u2moe_stream_feed_finished(handle)); }
    /// Have decoding stop within one chunk. Any thread may call this.
    public void Cancel() { Native.Check(Native.u2moe_stream_cancel(handle)); }
    /// Recognise the queued audio of streams in batches.
    public static void Decode(params Stream[] streams) {
      Native.Check(Native.u2moe_decode_streams(Array.ConvertAll(streams, stream => stream.handle), (UIntPtr)streams.Length));
    }
    /// Return the final results that are ready. Each result is returned once.
    public IEnumerable<Result> TakeSegments() {
      for (;;) {
        IntPtr found;
        Native.Check(Native.u2moe_stream_take_segment(handle, out found));
        if (found == IntPtr.Zero) yield break;
        var result = Result.Of(found);
        Native.u2moe_result_free(found);
        yield return result;
      }
    }
    public void Dispose() { Native.u2moe_stream_free(handle); }
  }

  /// Recognises one source in a thread of the library. This thread raises the events.
  public sealed class Transcriber : IDisposable {
    public event Action<Result> Partial, Final;
    public event Action<U2moeException> Failed;
    public event Action<bool, double> Speech;
    readonly IntPtr handle;
    Native.Callbacks callbacks;  // keeps the delegates alive

    public Transcriber(Recognizer recognizer) {
      callbacks = new Native.Callbacks {
        Size = (UIntPtr)Marshal.SizeOf(typeof(Native.Callbacks)),
        OnPartial = (context, result) => Tell(() => { if (Partial != null) Partial(Result.Of(result)); }),
        OnFinal = (context, result) => Tell(() => { if (Final != null) Final(Result.Of(result)); }),
        OnError = (context, error, message) => {
          var failure = new U2moeException(error, Native.Utf8(message));
          if (Failed != null) Failed(failure);
        },
        OnSpeech = (context, isSpeech, time) => Tell(() => { if (Speech != null) Speech(isSpeech != 0, time); }) };
      Native.Check(Native.u2moe_transcriber_create(recognizer.Handle, IntPtr.Zero, ref callbacks, out handle));
    }

    // Do work in a callback. No exception may pass through C.
    void Tell(Action work) {
      try {
        work();
      } catch (Exception error) {
        if (Failed != null) Failed(new U2moeException(11, error.Message));
      }
    }

    /// Queue samples and return. An audio callback may call this.
    public void Feed(int rate, short[] samples) { Native.Check(Native.u2moe_transcriber_feed_int16(handle, rate, samples, (UIntPtr)samples.Length)); }
    /// Finish the input and wait until all of it is recognised.
    public void Wait() { Native.Check(Native.u2moe_transcriber_wait(handle)); }
    public void Cancel() { Native.Check(Native.u2moe_transcriber_cancel(handle)); }
    public void Dispose() { Native.u2moe_transcriber_free(handle); GC.KeepAlive(this); }
  }
}
