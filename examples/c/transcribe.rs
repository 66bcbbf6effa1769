// Recognises samples of 16 bits, one channel, from standard input:  transcribe BUNDLE RATE < samples
// rustc transcribe.rs -L PREFIX/lib -l u2moe
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::io::Read;
use std::ptr::null_mut;

#[repr(C)]
struct View {
    size: usize,
    text: *const c_char,
    is_final: i32,
    segment: i32,
    start: f64,
    end: f64,
    confidence: f64,
    tokens: *const i32,
    times: *const f64,
    num_tokens: usize,
    num_times: usize,
    words: *const c_void,
    num_words: usize,
    nbest: *const c_void,
    num_nbest: usize,
}

type Handle = *mut c_void;

extern "C" {
    fn u2moe_error_message() -> *const c_char;
    fn u2moe_recognizer_open(folder: *const c_char, options: *const c_void, recognizer: *mut Handle) -> c_int;
    fn u2moe_recognizer_free(recognizer: Handle) -> c_int;
    fn u2moe_stream_create(recognizer: Handle, options: *const c_void, stream: *mut Handle) -> c_int;
    fn u2moe_stream_accept_waveform_int16(stream: Handle, rate: i32, samples: *const i16, num: usize) -> c_int;
    fn u2moe_stream_input_finished(stream: Handle) -> c_int;
    fn u2moe_stream_take_segment(stream: Handle, result: *mut Handle) -> c_int;
    fn u2moe_stream_free(stream: Handle) -> c_int;
    fn u2moe_result_get(result: Handle, view: *mut View) -> c_int;
    fn u2moe_result_free(result: Handle) -> c_int;
}

fn text(pointer: *const c_char) -> String {
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn check(error: c_int) {
    if error != 0 {
        eprintln!("{}", text(unsafe { u2moe_error_message() }));
        std::process::exit(1);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (folder, rate) = (CString::new(&*arguments[1]).unwrap(), arguments[2].parse().unwrap());
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).unwrap();
    let samples: Vec<i16> = bytes.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
    let (mut recognizer, mut stream, mut result) = (null_mut(), null_mut(), null_mut());
    unsafe {
        check(u2moe_recognizer_open(folder.as_ptr(), null_mut(), &mut recognizer));
        check(u2moe_stream_create(recognizer, null_mut(), &mut stream));
        check(u2moe_stream_accept_waveform_int16(stream, rate, samples.as_ptr(), samples.len()));
        check(u2moe_stream_input_finished(stream));
        loop {
            check(u2moe_stream_take_segment(stream, &mut result));
            if result.is_null() {
                break;
            }
            let mut view: View = std::mem::zeroed();
            view.size = std::mem::size_of::<View>();
            check(u2moe_result_get(result, &mut view));
            println!("{:.2} {:.2} {}", view.start, view.end, text(view.text));
            check(u2moe_result_free(result));
        }
        check(u2moe_stream_free(stream));
        check(u2moe_recognizer_free(recognizer));
    }
}
