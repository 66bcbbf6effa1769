//! Rust declarations of `u2moe.h`, which documents each function and the rules for threads.
#![allow(non_camel_case_types)]
#![no_std]
use core::ffi::{c_char, c_int, c_void};

macro_rules! handles {
    ($($name:ident),*) => {$(pub type $name = *mut c_void;)*};
}
handles!(u2moe_recognizer, u2moe_stream, u2moe_result, u2moe_hotwords, u2moe_language_model, u2moe_vad, u2moe_transcriber);

pub type u2moe_error = c_int;
pub const U2MOE_OK: u2moe_error = 0;
pub const U2MOE_QUEUE_FULL: u2moe_error = 12;
pub const U2MOE_CANCELLED: u2moe_error = 13;
pub const U2MOE_FULL_CONTEXT: i32 = -1;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct u2moe_endpoint_rule {
    pub must_contain_nonsilence: i32,
    pub min_trailing_silence: f64,
    pub min_utterance_length: f64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct u2moe_stream_options {
    pub size: usize,
    pub chunk_size: i32,
    pub num_left_chunks: i32,
    pub search: *const c_char,
    pub beam_size: i32,
    pub ctc_weight: f64,
    pub reverse_weight: f64,
    pub length_penalty: f64,
    pub padding_s: f64,
    pub endpoint: i32,
    pub rules: [u2moe_endpoint_rule; 3],
    pub pause: f64,
    pub hotwords: u2moe_hotwords,
    pub language_model: u2moe_language_model,
    pub vad: u2moe_vad,
    pub written: i32,
    pub blank_penalty: f64,
    pub max_queue_s: f64,
}

#[repr(C)]
pub struct u2moe_hotword {
    pub phrase: *const c_char,
    pub weight: f64,
}

#[repr(C)]
pub struct u2moe_word {
    pub text: *const c_char,
    pub start: f64,
    pub end: f64,
    pub confidence: f64,
}

#[repr(C)]
pub struct u2moe_result_view {
    pub size: usize,
    pub text: *const c_char,
    pub is_final: i32,
    pub segment: i32,
    pub start: f64,
    pub end: f64,
    pub confidence: f64,
    pub tokens: *const i32,
    pub times: *const f64,
    pub num_tokens: usize,
    pub num_times: usize,
    pub words: *const u2moe_word,
    pub num_words: usize,
    pub nbest: *const c_void,
    pub num_nbest: usize,
    pub score: f64,
    pub nbest_times: *const *const f64,
    pub committed: *const c_char,
    pub num_committed: i32,
    pub revised: i32,
    pub committed_end: f64,
}

pub type u2moe_on_result = extern "C" fn(context: *mut c_void, result: u2moe_result);
pub type u2moe_on_error = extern "C" fn(context: *mut c_void, error: u2moe_error, message: *const c_char);
pub type u2moe_on_speech = extern "C" fn(context: *mut c_void, is_speech: i32, time: f64);

#[repr(C)]
pub struct u2moe_transcriber_callbacks {
    pub size: usize,
    pub context: *mut c_void,
    pub on_partial: Option<u2moe_on_result>,
    pub on_final: Option<u2moe_on_result>,
    pub on_error: Option<u2moe_on_error>,
    pub on_speech: Option<u2moe_on_speech>,
}

extern "C" {
    pub fn u2moe_error_message() -> *const c_char;
    pub fn u2moe_error_name(error: u2moe_error) -> *const c_char;
    pub fn u2moe_version() -> *const c_char;
    pub fn u2moe_verify(folder: *const c_char) -> u2moe_error;
    pub fn u2moe_recognizer_open(folder: *const c_char, options: *const c_void, recognizer: *mut u2moe_recognizer) -> u2moe_error;
    pub fn u2moe_recognizer_sample_rate(recognizer: u2moe_recognizer, rate: *mut i32) -> u2moe_error;
    pub fn u2moe_recognizer_describe(recognizer: u2moe_recognizer, json: *mut *const c_char) -> u2moe_error;
    pub fn u2moe_recognizer_free(recognizer: u2moe_recognizer) -> u2moe_error;
    pub fn u2moe_hotwords_create(recognizer: u2moe_recognizer, phrases: *const u2moe_hotword, num: usize, hotwords: *mut u2moe_hotwords) -> u2moe_error;
    pub fn u2moe_hotwords_free(hotwords: u2moe_hotwords) -> u2moe_error;
    pub fn u2moe_stream_options_init(options: *mut u2moe_stream_options, size: usize) -> u2moe_error;
    pub fn u2moe_stream_create(recognizer: u2moe_recognizer, options: *const u2moe_stream_options, stream: *mut u2moe_stream) -> u2moe_error;
    pub fn u2moe_stream_feed(stream: u2moe_stream, rate: i32, samples: *const f32, num: usize) -> u2moe_error;
    pub fn u2moe_stream_feed_int16(stream: u2moe_stream, rate: i32, samples: *const i16, num: usize) -> u2moe_error;
    pub fn u2moe_stream_feed_finished(stream: u2moe_stream) -> u2moe_error;
    pub fn u2moe_decode_streams(streams: *const u2moe_stream, num: usize) -> u2moe_error;
    pub fn u2moe_stream_failure(stream: u2moe_stream) -> u2moe_error;
    pub fn u2moe_stream_cancel(stream: u2moe_stream) -> u2moe_error;
    pub fn u2moe_stream_take_segment(stream: u2moe_stream, result: *mut u2moe_result) -> u2moe_error;
    pub fn u2moe_stream_get_result(stream: u2moe_stream, result: *mut u2moe_result) -> u2moe_error;
    pub fn u2moe_stream_reset(stream: u2moe_stream) -> u2moe_error;
    pub fn u2moe_stream_free(stream: u2moe_stream) -> u2moe_error;
    pub fn u2moe_transcriber_create(
        recognizer: u2moe_recognizer,
        options: *const u2moe_stream_options,
        callbacks: *const u2moe_transcriber_callbacks,
        transcriber: *mut u2moe_transcriber,
    ) -> u2moe_error;
    pub fn u2moe_transcriber_feed(transcriber: u2moe_transcriber, rate: i32, samples: *const f32, num: usize) -> u2moe_error;
    pub fn u2moe_transcriber_feed_int16(transcriber: u2moe_transcriber, rate: i32, samples: *const i16, num: usize) -> u2moe_error;
    pub fn u2moe_transcriber_queued(transcriber: u2moe_transcriber, seconds: *mut f64) -> u2moe_error;
    pub fn u2moe_transcriber_wait(transcriber: u2moe_transcriber) -> u2moe_error;
    pub fn u2moe_transcriber_cancel(transcriber: u2moe_transcriber) -> u2moe_error;
    pub fn u2moe_transcriber_free(transcriber: u2moe_transcriber) -> u2moe_error;
    pub fn u2moe_result_get(result: u2moe_result, view: *mut u2moe_result_view) -> u2moe_error;
    pub fn u2moe_result_json(result: u2moe_result, json: *mut *const c_char) -> u2moe_error;
    pub fn u2moe_result_free(result: u2moe_result) -> u2moe_error;
}
