// Recognises samples of 16 bits, one channel, from standard input:  transcribe BUNDLE RATE < samples
// go run transcribe.go; finds the library by pkg-config.
package main

// #cgo pkg-config: u2moe
// #include <stdlib.h>
// #include <u2moe.h>
import "C"

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"unsafe"
)

func check(code C.u2moe_error) {
	if code != C.U2MOE_OK {
		fmt.Fprintln(os.Stderr, C.GoString(C.u2moe_error_message()))
		os.Exit(1)
	}
}

func main() {
	runtime.LockOSThread() // messages belong to the thread of the call
	rate, err := strconv.Atoi(os.Args[2])
	samples, problem := io.ReadAll(os.Stdin)
	if err != nil || problem != nil || len(samples) < 2 {
		fmt.Fprintln(os.Stderr, "usage: transcribe BUNDLE RATE < samples")
		os.Exit(2)
	}
	folder := C.CString(os.Args[1])
	defer C.free(unsafe.Pointer(folder))
	var recognizer C.u2moe_recognizer
	var stream C.u2moe_stream
	check(C.u2moe_recognizer_open(folder, nil, &recognizer))
	defer C.u2moe_recognizer_free(recognizer)
	check(C.u2moe_stream_create(recognizer, nil, &stream))
	defer C.u2moe_stream_free(stream)
	first := (*C.int16_t)(unsafe.Pointer(&samples[0]))
	check(C.u2moe_stream_accept_waveform_int16(stream, C.int32_t(rate), first, C.size_t(len(samples)/2)))
	check(C.u2moe_stream_input_finished(stream))
	for {
		var result C.u2moe_result
		check(C.u2moe_stream_take_segment(stream, &result))
		if result == nil {
			return
		}
		var view C.u2moe_result_view
		view.size = C.sizeof_u2moe_result_view
		check(C.u2moe_result_get(result, &view))
		fmt.Printf("%.2f %.2f %s\n", float64(view.start), float64(view.end), C.GoString(view.text))
		check(C.u2moe_result_free(result))
	}
}
