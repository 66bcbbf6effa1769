//! Recognise 16-bit mono samples from standard input: transcribe BUNDLE RATE < samples
use std::io::Read;
use std::sync::mpsc;
use u2moe::{Error, Event, Options, Recognizer};

fn transcribe(folder: &str, rate: i32, samples: &[i16]) -> Result<(), Error> {
    let recognizer = Recognizer::open(folder)?;
    let (events, told) = mpsc::channel();
    let transcriber = recognizer.transcriber(&Options::default(), move |event| drop(events.send(event)))?;
    for part in samples.chunks(160) {
        while let Err(error) = transcriber.feed(rate, part) {
            if !error.is_queue_full() {
                return Err(error);
            }
            std::thread::sleep(std::time::Duration::from_millis(10)); // a microphone would drop these samples
        }
    }
    transcriber.wait()?;
    drop(transcriber);
    for event in told {
        match event {
            Event::Final(result) => println!("{:.2} {:.2} {}", result.start, result.end, result.text),
            Event::Partial(result) => eprintln!("{}", result.text),
            _ => {}
        }
    }
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).expect("stdin");
    let samples: Vec<i16> = bytes.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
    if let Err(error) = transcribe(&arguments[1], arguments[2].parse().expect("a rate"), &samples) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
