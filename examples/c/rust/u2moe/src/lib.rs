//! Speech recognition with a u2moe bundle.
//!
//! ```no_run
//! let recognizer = u2moe::Recognizer::open("bundle")?;
//! let mut captions = recognizer.transcriber(&u2moe::Options::default(), |event| println!("{event:?}"))?;
//! captions.feed(16000, &[0i16; 160])?; // never waits, so an audio callback may call this
//! captions.wait()?;
//! # Ok::<(), u2moe::Error>(())
//! ```
use std::ffi::{c_char, c_void, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, ptr};
use u2moe_sys as sys;

/// An error. It has the name of the error code in `u2moe.h`, and a message that says what is wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    pub code: i32,
    pub name: String,
    pub message: String,
}

impl Error {
    fn of(code: i32, message: *const c_char) -> Self {
        Error { code, name: text(unsafe { sys::u2moe_error_name(code) }), message: text(message) }
    }
    /// Whether no samples were accepted because the queue would exceed its limit.
    pub fn is_queue_full(&self) -> bool {
        self.code == sys::U2MOE_QUEUE_FULL
    }
    pub fn is_cancelled(&self) -> bool {
        self.code == sys::U2MOE_CANCELLED
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.name, self.message)
    }
}
impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn check(code: i32) -> Result<()> {
    if code == sys::U2MOE_OK {
        return Ok(());
    }
    Err(Error::of(code, unsafe { sys::u2moe_error_message() }))
}

/// Convert text for C. Fails if the text has a zero byte, where C would end it.
fn c_text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error { code: 1, name: "U2MOE_INVALID_ARGUMENT".into(), message: format!("{text:?} has a zero byte") })
}

#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    pub text: String,
    pub start: f64,
    pub end: f64,
    pub confidence: f64,
}

/// Partial or final result of an utterance, with times in seconds after the first sample of the source.
#[derive(Clone, Debug, PartialEq)]
pub struct Utterance {
    pub text: String,
    pub is_final: bool,
    pub segment: i32,
    pub start: f64,
    pub end: f64,
    pub confidence: f64,
    pub score: f64,
    pub words: Vec<Word>,
}

impl Utterance {
    fn of(result: sys::u2moe_result) -> Result<Self> {
        let mut view: sys::u2moe_result_view = unsafe { std::mem::zeroed() };
        view.size = std::mem::size_of_val(&view);
        check(unsafe { sys::u2moe_result_get(result, &mut view) })?;
        let words = if view.num_words == 0 { &[] } else { unsafe { std::slice::from_raw_parts(view.words, view.num_words) } };
        let word = |each: &sys::u2moe_word| Word { text: text(each.text), start: each.start, end: each.end, confidence: each.confidence };
        Ok(Utterance {
            text: text(view.text),
            is_final: view.is_final != 0,
            segment: view.segment,
            start: view.start,
            end: view.end,
            confidence: view.confidence,
            score: view.score,
            words: words.iter().map(word).collect(),
        })
    }
}

/// Options of a stream: the fields of `u2moe_stream_options`. Initially they stand for the defaults of the bundle.
#[derive(Clone, Debug)]
pub struct Options(pub sys::u2moe_stream_options);

impl Default for Options {
    fn default() -> Self {
        let mut options: sys::u2moe_stream_options = unsafe { std::mem::zeroed() };
        let code = unsafe { sys::u2moe_stream_options_init(&mut options, std::mem::size_of_val(&options)) };
        check(code).expect("libu2moe must not be older than this crate");
        Options(options)
    }
}

/// Mono samples: `f32` in [-1, 1] or `i16`.
pub trait Sample: Copy {
    #[doc(hidden)]
    fn feed_stream(stream: sys::u2moe_stream, rate: i32, samples: &[Self]) -> i32;
    #[doc(hidden)]
    fn feed_transcriber(transcriber: sys::u2moe_transcriber, rate: i32, samples: &[Self]) -> i32;
}
impl Sample for f32 {
    fn feed_stream(stream: sys::u2moe_stream, rate: i32, samples: &[Self]) -> i32 {
        unsafe { sys::u2moe_stream_feed(stream, rate, samples.as_ptr(), samples.len()) }
    }
    fn feed_transcriber(transcriber: sys::u2moe_transcriber, rate: i32, samples: &[Self]) -> i32 {
        unsafe { sys::u2moe_transcriber_feed(transcriber, rate, samples.as_ptr(), samples.len()) }
    }
}
impl Sample for i16 {
    fn feed_stream(stream: sys::u2moe_stream, rate: i32, samples: &[Self]) -> i32 {
        unsafe { sys::u2moe_stream_feed_int16(stream, rate, samples.as_ptr(), samples.len()) }
    }
    fn feed_transcriber(transcriber: sys::u2moe_transcriber, rate: i32, samples: &[Self]) -> i32 {
        unsafe { sys::u2moe_transcriber_feed_int16(transcriber, rate, samples.as_ptr(), samples.len()) }
    }
}

/// A loaded bundle. Threads may share it, and streams may outlive it.
pub struct Recognizer(sys::u2moe_recognizer);
unsafe impl Send for Recognizer {}
unsafe impl Sync for Recognizer {}

impl Recognizer {
    pub fn open(folder: &str) -> Result<Self> {
        let (folder, mut handle) = (c_text(folder)?, ptr::null_mut());
        check(unsafe { sys::u2moe_recognizer_open(folder.as_ptr(), ptr::null(), &mut handle) })?;
        Ok(Recognizer(handle))
    }

    /// Sample rate of the model in Hz. Streams resample audio of other rates.
    pub fn sample_rate(&self) -> Result<i32> {
        let mut rate = 0;
        check(unsafe { sys::u2moe_recognizer_sample_rate(self.0, &mut rate) })?;
        Ok(rate)
    }

    pub fn stream(&self, options: &Options) -> Result<Stream> {
        let mut handle = ptr::null_mut();
        check(unsafe { sys::u2moe_stream_create(self.0, &options.0, &mut handle) })?;
        Ok(Stream(handle))
    }

    /// Recognise one source in a thread of the library, which calls `on_event`. The callback may drop the transcriber.
    pub fn transcriber(&self, options: &Options, on_event: impl FnMut(Event) + Send + 'static) -> Result<Transcriber> {
        let (call, mut handle): (Arc<Mutex<Call>>, _) = (Arc::new(Mutex::new(Box::new(on_event))), ptr::null_mut());
        let callbacks = sys::u2moe_transcriber_callbacks {
            size: std::mem::size_of::<sys::u2moe_transcriber_callbacks>(),
            context: Arc::as_ptr(&call).cast_mut().cast(),
            on_partial: Some(on_result),
            on_final: Some(on_result),
            on_error: Some(on_error),
            on_speech: Some(on_speech),
        };
        check(unsafe { sys::u2moe_transcriber_create(self.0, &options.0, &callbacks, &mut handle) })?;
        Ok(Transcriber { handle, _call: call })
    }
}

impl Drop for Recognizer {
    fn drop(&mut self) {
        unsafe { sys::u2moe_recognizer_free(self.0) };
    }
}

/// A stream of one audio source. Any thread may feed it. `decode` recognises the audio.
pub struct Stream(sys::u2moe_stream);
unsafe impl Send for Stream {}
unsafe impl Sync for Stream {}

impl Stream {
    /// Queue samples and return.
    pub fn feed<T: Sample>(&self, rate: i32, samples: &[T]) -> Result<()> {
        check(T::feed_stream(self.0, rate, samples))
    }
    pub fn finish(&self) -> Result<()> {
        check(unsafe { sys::u2moe_stream_feed_finished(self.0) })
    }
    /// Have decoding stop within one chunk. Any thread may call this.
    pub fn cancel(&self) {
        unsafe { sys::u2moe_stream_cancel(self.0) };
    }
    pub fn reset(&self) -> Result<()> {
        check(unsafe { sys::u2moe_stream_reset(self.0) })
    }
    /// Take the final results that are ready. Each result is returned once.
    pub fn take_segments(&self) -> Result<Vec<Utterance>> {
        let mut found = Vec::new();
        loop {
            let mut result = ptr::null_mut();
            check(unsafe { sys::u2moe_stream_take_segment(self.0, &mut result) })?;
            if result.is_null() {
                return Ok(found);
            }
            let utterance = Utterance::of(result);
            unsafe { sys::u2moe_result_free(result) };
            found.push(utterance?);
        }
    }
    /// Partial result of the current utterance.
    pub fn result(&self) -> Result<Utterance> {
        let mut result = ptr::null_mut();
        check(unsafe { sys::u2moe_stream_get_result(self.0, &mut result) })?;
        let utterance = Utterance::of(result);
        unsafe { sys::u2moe_result_free(result) };
        utterance
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        unsafe { sys::u2moe_stream_free(self.0) };
    }
}

/// Recognise the queued audio of streams in batches.
pub fn decode(streams: &[&Stream]) -> Result<()> {
    let handles: Vec<_> = streams.iter().map(|stream| stream.0).collect();
    check(unsafe { sys::u2moe_decode_streams(handles.as_ptr(), handles.len()) })
}

/// Events of a transcriber.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The text of the current utterance has changed.
    Partial(Utterance),
    Final(Utterance),
    /// Recognition has failed, and the transcriber has ended.
    Failed(Error),
    Speech { is_speech: bool, time: f64 },
}

type Call = Box<dyn FnMut(Event) + Send>;

// Call the closure with an event. A panic must not pass through C. The closure lives until it returns, even if it drops its
// transcriber.
fn tell(context: *mut c_void, event: Event) {
    let own = unsafe {
        Arc::increment_strong_count(context.cast::<Mutex<Call>>());
        Arc::from_raw(context.cast::<Mutex<Call>>())
    };
    if catch_unwind(AssertUnwindSafe(|| own.lock().unwrap_or_else(PoisonError::into_inner)(event))).is_err() {
        eprintln!("u2moe: a transcriber callback panicked");
    }
}
extern "C" fn on_result(context: *mut c_void, result: sys::u2moe_result) {
    if let Ok(utterance) = Utterance::of(result) {
        tell(context, if utterance.is_final { Event::Final(utterance) } else { Event::Partial(utterance) });
    }
}
extern "C" fn on_error(context: *mut c_void, error: i32, message: *const c_char) {
    tell(context, Event::Failed(Error::of(error, message)));
}
extern "C" fn on_speech(context: *mut c_void, is_speech: i32, time: f64) {
    tell(context, Event::Speech { is_speech: is_speech != 0, time });
}

/// Recognises one source in its own thread. Dropping the transcriber cancels remaining work.
pub struct Transcriber {
    handle: sys::u2moe_transcriber,
    _call: Arc<Mutex<Call>>,
}
unsafe impl Send for Transcriber {}
unsafe impl Sync for Transcriber {}

impl Transcriber {
    /// Queue samples and return. An audio callback may call this.
    pub fn feed<T: Sample>(&self, rate: i32, samples: &[T]) -> Result<()> {
        check(T::feed_transcriber(self.handle, rate, samples))
    }
    /// Finish the input and wait until all of it is recognised.
    pub fn wait(&self) -> Result<()> {
        check(unsafe { sys::u2moe_transcriber_wait(self.handle) })
    }
    pub fn cancel(&self) {
        unsafe { sys::u2moe_transcriber_cancel(self.handle) };
    }
}

impl Drop for Transcriber {
    fn drop(&mut self) {
        unsafe { sys::u2moe_transcriber_free(self.handle) }; // waits for the running callback, unless called in that callback
    }
}
