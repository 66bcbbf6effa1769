// Recognise 16-bit mono samples from standard input: go run ./transcribe BUNDLE RATE < samples
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
	"u2moe"
)

func transcribe(folder string, rate int, samples []int16) error {
	recognizer, err := u2moe.Open(folder)
	if err != nil {
		return err
	}
	defer recognizer.Close()
	transcriber, err := recognizer.Transcriber(u2moe.Options{}, u2moe.Events{
		Partial: func(result u2moe.Result) { fmt.Fprintln(os.Stderr, result.Text) },
		Final:   func(result u2moe.Result) { fmt.Printf("%.2f %.2f %s\n", result.Start, result.End, result.Text) },
	})
	if err != nil {
		return err
	}
	defer transcriber.Close()
	for begin := 0; begin < len(samples); begin += 160 {
		part := samples[begin:min(begin+160, len(samples))]
		for err = transcriber.Feed(rate, part); errors.Is(err, u2moe.ErrQueueFull); err = transcriber.Feed(rate, part) {
			time.Sleep(10 * time.Millisecond) // a program with a microphone would drop these samples
		}
		if err != nil {
			return err
		}
	}
	return transcriber.Wait()
}

func main() {
	rate, err := strconv.Atoi(os.Args[2])
	bytes, problem := io.ReadAll(os.Stdin)
	samples := make([]int16, len(bytes)/2)
	for i := range samples {
		samples[i] = int16(binary.LittleEndian.Uint16(bytes[2*i:]))
	}
	if err = errors.Join(err, problem); err == nil {
		err = transcribe(os.Args[1], rate, samples)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
