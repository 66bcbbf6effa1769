//! Needs a bundle in `BUNDLE`, and 16-bit samples at 16 kHz in the file `SAMPLES`.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use u2moe::{Options, Recognizer, Transcriber};

struct Lasting(Arc<AtomicBool>);
impl Drop for Lasting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_transcriber_may_be_dropped_by_its_own_callback() {
    let recognizer = Recognizer::open(&std::env::var("BUNDLE").expect("BUNDLE")).expect("a bundle");
    let bytes = std::fs::read(std::env::var("SAMPLES").expect("SAMPLES")).expect("samples");
    let samples: Vec<i16> = bytes.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
    let mut options = Options::default();
    options.0.max_queue_s = 60.0;
    let (slot, is_gone) = (Arc::new(Mutex::new(None::<Transcriber>)), Arc::new(AtomicBool::new(false)));
    let (lasting, own, gone) = (Lasting(is_gone.clone()), slot.clone(), is_gone.clone());
    let (calls, told) = mpsc::channel();
    let transcriber = recognizer
        .transcriber(&options, move |_| {
            let _held = &lasting;
            drop(own.lock().unwrap().take());
            calls.send(gone.load(Ordering::SeqCst)).unwrap();
        })
        .expect("a transcriber");
    let fed = slot.lock().unwrap().insert(transcriber).feed(16000, &samples);
    fed.expect("a queue of a minute");
    let seen: Vec<bool> = told.iter().collect(); // ends when the closure is dropped
    assert_eq!(seen, [false]); // the closure was called once, and lived until it returned
    assert!(is_gone.load(Ordering::SeqCst));
}
