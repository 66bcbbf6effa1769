// Package u2moe recognises speech with a u2moe bundle. It links libu2moe through pkg-config.
//
// The rules for threads in u2moe.h apply to goroutines: any goroutine may feed, cancel and take results.
package u2moe

// #cgo pkg-config: u2moe
// #include <stdlib.h>
// #include <u2moe.h>
//
// void u2moeGoResult(void *context, u2moe_result result);
// void u2moeGoError(void *context, u2moe_error error, char *message);
// void u2moeGoSpeech(void *context, int32_t is_speech, double time);
//
// static u2moe_error create_transcriber(u2moe_recognizer recognizer, const u2moe_stream_options *options, uintptr_t context,
//                                       u2moe_transcriber *transcriber) {
//   u2moe_transcriber_callbacks callbacks = {sizeof callbacks, (void *)context, u2moeGoResult, u2moeGoResult,
//                                            (void (*)(void *, u2moe_error, const char *))u2moeGoError, u2moeGoSpeech};
//   return u2moe_transcriber_create(recognizer, options, &callbacks, transcriber);
// }
import "C"

import (
	"runtime"
	"runtime/cgo"
	"unsafe"
)

// An Error contains the name of its code in u2moe.h and a message.
type Error struct {
	Code          int
	Name, Message string
}

func (e *Error) Error() string { return e.Name + ": " + e.Message }

// Is compares error codes, for errors.Is with ErrQueueFull and ErrCancelled.
func (e *Error) Is(target error) bool {
	other, ok := target.(*Error)
	return ok && other.Code == e.Code
}

// ErrQueueFull means that the queue would exceed its limit, and no samples were accepted. ErrCancelled means that the stream
// was cancelled.
var (
	ErrQueueFull = &Error{Code: C.U2MOE_QUEUE_FULL, Name: "U2MOE_QUEUE_FULL"}
	ErrCancelled = &Error{Code: C.U2MOE_CANCELLED, Name: "U2MOE_CANCELLED"}
)

func errorOf(code C.u2moe_error, message string) error {
	return &Error{int(code), C.GoString(C.u2moe_error_name(code)), message}
}

// call makes a call, and reads its error message in the same thread, because each thread has its own message.
func call(work func() C.u2moe_error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if code := work(); code != C.U2MOE_OK {
		return errorOf(code, C.GoString(C.u2moe_error_message()))
	}
	return nil
}

// A Word is a recognised word, with times in seconds after the first sample of the source.
type Word struct {
	Text                   string
	Start, End, Confidence float64
}

// A Result is a partial or final result of an utterance.
type Result struct {
	Text                          string
	IsFinal                       bool
	Segment                       int
	Start, End, Confidence, Score float64
	Words                         []Word
}

func resultOf(handle C.u2moe_result) (Result, error) {
	var view C.u2moe_result_view
	view.size = C.sizeof_u2moe_result_view
	if err := call(func() C.u2moe_error { return C.u2moe_result_get(handle, &view) }); err != nil {
		return Result{}, err
	}
	found := Result{C.GoString(view.text), view.is_final != 0, int(view.segment), float64(view.start), float64(view.end),
		float64(view.confidence), float64(view.score), nil}
	for _, word := range unsafe.Slice(view.words, int(view.num_words)) {
		found.Words = append(found.Words, Word{C.GoString(word.text), float64(word.start), float64(word.end), float64(word.confidence)})
	}
	return found, nil
}

// Options configure a stream. Zero values stand for the defaults of the bundle.
type Options struct {
	ChunkSize     int     // -1: full context
	NumLeftChunks int     // 0: all
	BeamSize      int     //
	MaxQueueS     float64 // seconds of audio that may wait; 0: the default, 10
}

func (o Options) inC() (C.u2moe_stream_options, error) {
	var options C.u2moe_stream_options
	err := call(func() C.u2moe_error { return C.u2moe_stream_options_init(&options, C.sizeof_u2moe_stream_options) })
	options.chunk_size, options.beam_size = C.int32_t(o.ChunkSize), C.int32_t(o.BeamSize)
	if o.NumLeftChunks != 0 {
		options.num_left_chunks = C.int32_t(o.NumLeftChunks)
	}
	if o.MaxQueueS != 0 {
		options.max_queue_s = C.double(o.MaxQueueS)
	}
	return options, err
}

// A Recognizer is a loaded bundle.
type Recognizer struct{ handle C.u2moe_recognizer }

// Open loads a bundle after comparing every file with its digest.
func Open(folder string) (*Recognizer, error) {
	name := C.CString(folder)
	defer C.free(unsafe.Pointer(name))
	var r Recognizer
	if err := call(func() C.u2moe_error { return C.u2moe_recognizer_open(name, nil, &r.handle) }); err != nil {
		return nil, err
	}
	return &r, nil
}

// Close frees the recogniser. Open streams keep what they need and remain usable.
func (r *Recognizer) Close() error {
	return call(func() C.u2moe_error { return C.u2moe_recognizer_free(r.handle) })
}

// A Stream has one audio source. Any goroutine may feed it. Decode recognises the audio.
type Stream struct{ handle C.u2moe_stream }

// Stream creates a stream for one source.
func (r *Recognizer) Stream(options Options) (*Stream, error) {
	chosen, err := options.inC()
	if err != nil {
		return nil, err
	}
	var s Stream
	if err := call(func() C.u2moe_error { return C.u2moe_stream_create(r.handle, &chosen, &s.handle) }); err != nil {
		return nil, err
	}
	return &s, nil
}

// Feed queues mono samples and returns.
func (s *Stream) Feed(rate int, samples []int16) error {
	return call(func() C.u2moe_error {
		return C.u2moe_stream_feed_int16(s.handle, C.int32_t(rate), (*C.int16_t)(unsafe.SliceData(samples)), C.size_t(len(samples)))
	})
}

// Finish ends the input.
func (s *Stream) Finish() error {
	return call(func() C.u2moe_error { return C.u2moe_stream_feed_finished(s.handle) })
}

// Cancel stops decoding within one chunk. Any goroutine may call it.
func (s *Stream) Cancel() error {
	return call(func() C.u2moe_error { return C.u2moe_stream_cancel(s.handle) })
}

// Close frees the stream.
func (s *Stream) Close() error {
	return call(func() C.u2moe_error { return C.u2moe_stream_free(s.handle) })
}

// Decode recognises the queued audio of streams in batches.
func Decode(streams ...*Stream) error {
	handles := make([]C.u2moe_stream, len(streams))
	for i, stream := range streams {
		handles[i] = stream.handle
	}
	return call(func() C.u2moe_error { return C.u2moe_decode_streams(unsafe.SliceData(handles), C.size_t(len(handles))) })
}

// TakeSegments returns the final results that are ready. Each result is returned once.
func (s *Stream) TakeSegments() ([]Result, error) {
	var all []Result
	for {
		var handle C.u2moe_result
		if err := call(func() C.u2moe_error { return C.u2moe_stream_take_segment(s.handle, &handle) }); err != nil || handle == nil {
			return all, err
		}
		result, err := resultOf(handle)
		C.u2moe_result_free(handle)
		if err != nil {
			return all, err
		}
		all = append(all, result)
	}
}

// Events are callbacks of a transcriber. A thread of the library calls them. Any callback may be nil.
type Events struct {
	Partial, Final func(Result)
	Failed         func(error)
	Speech         func(isSpeech bool, time float64)
}

// A Transcriber recognises one source in a thread of the library.
type Transcriber struct {
	handle C.u2moe_transcriber
	events cgo.Handle
}

// Transcriber creates a transcriber, which always ends utterances by endpoint rules.
func (r *Recognizer) Transcriber(options Options, events Events) (*Transcriber, error) {
	chosen, err := options.inC()
	if err != nil {
		return nil, err
	}
	t := Transcriber{events: cgo.NewHandle(events)}
	err = call(func() C.u2moe_error { return C.create_transcriber(r.handle, &chosen, C.uintptr_t(t.events), &t.handle) })
	if err != nil {
		t.events.Delete()
		return nil, err
	}
	return &t, nil
}

// Feed queues samples and returns. An audio callback may call it. If errors.Is(err, ErrQueueFull), no samples were accepted.
func (t *Transcriber) Feed(rate int, samples []int16) error {
	return call(func() C.u2moe_error {
		return C.u2moe_transcriber_feed_int16(t.handle, C.int32_t(rate), (*C.int16_t)(unsafe.SliceData(samples)), C.size_t(len(samples)))
	})
}

// Wait finishes the input and returns when all of it is recognised.
func (t *Transcriber) Wait() error {
	return call(func() C.u2moe_error { return C.u2moe_transcriber_wait(t.handle) })
}

// Cancel stops the transcriber within one chunk.
func (t *Transcriber) Cancel() error {
	return call(func() C.u2moe_error { return C.u2moe_transcriber_cancel(t.handle) })
}

// Close cancels remaining work and frees the transcriber. Its own events must not call it.
func (t *Transcriber) Close() error {
	defer t.events.Delete()
	return call(func() C.u2moe_error { return C.u2moe_transcriber_free(t.handle) })
}

//export u2moeGoResult
func u2moeGoResult(context unsafe.Pointer, handle C.u2moe_result) {
	events := cgo.Handle(uintptr(context)).Value().(Events)
	result, err := resultOf(handle)
	switch {
	case err != nil:
	case result.IsFinal && events.Final != nil:
		events.Final(result)
	case !result.IsFinal && events.Partial != nil:
		events.Partial(result)
	}
}

//export u2moeGoError
func u2moeGoError(context unsafe.Pointer, code C.u2moe_error, message *C.char) {
	if failed := cgo.Handle(uintptr(context)).Value().(Events).Failed; failed != nil {
		failed(errorOf(code, C.GoString(message)))
	}
}

//export u2moeGoSpeech
func u2moeGoSpeech(context unsafe.Pointer, isSpeech C.int32_t, time C.double) {
	if speech := cgo.Handle(uintptr(context)).Value().(Events).Speech; speech != nil {
		speech(isSpeech != 0, float64(time))
	}
}
