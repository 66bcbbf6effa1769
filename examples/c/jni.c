/* Native methods of a class `U2moe`, for Kotlin and for Java before 22, on Android. A test compiles this file; it was
 * never run.
 *
 *     object U2moe {
 *       init { System.loadLibrary("u2moe_jni") }
 *       external fun open(folder: String): Long                       // 0: see message()
 *       external fun createStream(recognizer: Long): Long
 *       external fun accept(stream: Long, rate: Int, samples: ShortArray): Int
 *       external fun finish(stream: Long): Int
 *       external fun takeSegment(stream: Long): String?               // JSON, with the field names of Python
 *       external fun freeStream(stream: Long): Int
 *       external fun freeRecognizer(recognizer: Long): Int
 *       external fun message(): String
 *     } */
#include <jni.h>

#include "u2moe.h"

#define METHOD(type, name, ...) JNIEXPORT type JNICALL Java_U2moe_##name(JNIEnv *env, jobject self, __VA_ARGS__)
#define HANDLE(type, number) ((type)(uintptr_t)(number))

METHOD(jlong, open, jstring folder) {
  const char *path = (*env)->GetStringUTFChars(env, folder, NULL);
  u2moe_recognizer recognizer = NULL;
  (void)self;
  if (!path) return 0;
  u2moe_recognizer_open(path, NULL, &recognizer);
  (*env)->ReleaseStringUTFChars(env, folder, path);
  return (jlong)(uintptr_t)recognizer;
}

METHOD(jlong, createStream, jlong recognizer) {
  u2moe_stream stream = NULL;
  (void)env, (void)self;
  u2moe_stream_create(HANDLE(u2moe_recognizer, recognizer), NULL, &stream);
  return (jlong)(uintptr_t)stream;
}

METHOD(jint, accept, jlong stream, jint rate, jshortArray samples) {
  const size_t num = (size_t)(*env)->GetArrayLength(env, samples);
  jshort *content = (*env)->GetShortArrayElements(env, samples, NULL);
  u2moe_error error;
  (void)self;
  if (!content) return U2MOE_OUT_OF_MEMORY;
  error = u2moe_stream_accept_waveform_int16(HANDLE(u2moe_stream, stream), rate, content, num);
  (*env)->ReleaseShortArrayElements(env, samples, content, JNI_ABORT);
  return (jint)error;
}

METHOD(jint, finish, jlong stream) {
  (void)env, (void)self;
  return (jint)u2moe_stream_input_finished(HANDLE(u2moe_stream, stream));
}

METHOD(jstring, takeSegment, jlong stream) {
  u2moe_result result = NULL;
  const char *json = NULL;
  jstring text = NULL;
  (void)self;
  if (u2moe_stream_take_segment(HANDLE(u2moe_stream, stream), &result) || !result) return NULL;
  if (!u2moe_result_json(result, &json)) text = (*env)->NewStringUTF(env, json);
  u2moe_result_free(result);
  return text;
}

METHOD(jint, freeStream, jlong stream) {
  (void)env, (void)self;
  return (jint)u2moe_stream_free(HANDLE(u2moe_stream, stream));
}

METHOD(jint, freeRecognizer, jlong recognizer) {
  (void)env, (void)self;
  return (jint)u2moe_recognizer_free(HANDLE(u2moe_recognizer, recognizer));
}

JNIEXPORT jstring JNICALL Java_U2moe_message(JNIEnv *env, jobject self) {
  (void)self;
  return (*env)->NewStringUTF(env, u2moe_error_message());
}
