/* Mansard's runtime as a C library: artifacts -> tokens. Written by cbindgen from runtime/c; see docs/embedding.md.
 *
 * Every function gives a mansard_status; after one that is not MANSARD_OK, mansard_error() says what was expected and found,
 * for the calling thread. Handles are checked: one that was freed, or is null where that makes no sense, is MANSARD_USAGE.
 * Pointers to other things must be null or what they are said to be: null is refused unless allowed. They are read and written during the call alone, but
 * for the bytes of mansard_model_open_memory. Each function says which threads may call it. Nothing here survives a fork.
 *
 * Link with libmansard.so, or with libmansard.a -lm -lpthread.
 */

#ifndef MANSARD_H
#define MANSARD_H

#include <stddef.h>
#include <stdint.h>

// For mansard_logits: the row of the last token.
#define MANSARD_LAST_ROW 0

// For mansard_logits: a row for each token.
#define MANSARD_ALL_ROWS 1

// For mansard_model_open: trust the weights, that is, do not check their hashes. Everything else is always checked.
#define MANSARD_TRUST_WEIGHTS 1

// For an answer's format: any text.
#define MANSARD_TEXT 0

// For an answer's format: any JSON object.
#define MANSARD_JSON 1

// For an answer's format: JSON of the schema in `grammar`.
#define MANSARD_SCHEMA 2

// For an answer's format: what the regular expression in `grammar` matches from its beginning to its end; in Rust's syntax,
// without look-around.
#define MANSARD_REGEX 3

// For an answer's format: what the context-free grammar in `grammar` generates, which is in Lark's form.
#define MANSARD_LARK 4

// For mansard_next: wait as long as it takes.
#define MANSARD_FOREVER 4294967295

// The version of this interface: the major one times 65536, which changes when something is removed or means something else,
// or a structure has more fields, and the minor one, which changes when something else is added.
#define MANSARD_ABI_VERSION 131072

// What became of a call. Whatever is not MANSARD_OK leaves a message, see mansard_error.
typedef enum {
  // Done.
  MANSARD_OK = 0,
  // A call that makes no sense: a null pointer, a freed handle, an option out of range, an empty or too long prompt.
  MANSARD_USAGE = 2,
  // Outside bytes that are damaged or inconsistent: an artifact, a tokenizer, text that is no UTF-8.
  MANSARD_INPUT = 3,
  // Well-formed, but nothing for this version or this machine.
  MANSARD_UNSUPPORTED = 4,
  // The operating system refused: a missing file, no memory.
  MANSARD_IO = 5,
  // Too many requests wait; the message says after which time to try again.
  MANSARD_BUSY = 6,
  // The service takes no more requests.
  MANSARD_CLOSED = 7,
  // The buffer is too small; what is needed has been written to the place for the size.
  MANSARD_TOO_SMALL = 8,
  // A broken invariant of Mansard itself; please report it.
  MANSARD_INTERNAL = 70,
} mansard_status;

// What an event tells.
typedef enum {
  // Nothing came in time.
  MANSARD_NOTHING = 0,
  // A token, and the text that can be shown now.
  MANSARD_TOKEN = 1,
  // The end of one answer, and text that was held back.
  MANSARD_DONE = 2,
  // The end of all answers; nothing comes after it.
  MANSARD_END = 3,
  // An error, which `status` and `text` tell. Only functions of the caller's hear of it this way; nothing comes after it.
  MANSARD_FAILED = 4,
} mansard_kind;

// Why an answer ended.
typedef enum {
  // It has not.
  MANSARD_GOES_ON = 0,
  // The model said so.
  MANSARD_STOP_TOKEN = 1,
  // As many tokens as asked for.
  MANSARD_MAX_TOKENS = 2,
  // The context is full, or what the caches hold.
  MANSARD_CONTEXT = 3,
  // One of the texts in `stop` came.
  MANSARD_STOP_TEXT = 4,
} mansard_finish;

// A model with memory and workers of its own, for one thing at a time.
typedef struct mansard_engine mansard_engine;

// An opened artifact and its tokenizer.
typedef struct mansard_model mansard_model;

// Answers on their way.
typedef struct mansard_request mansard_request;

// A model that many requests share, from any thread.
typedef struct mansard_service mansard_service;

// How a model is run. All zero: all physical cores, weights read where they are mapped.
typedef struct {
  // Worker threads; 0 for one on each physical core.
  uint32_t threads;
  // Not 0: keep each worker to a core of its own.
  uint32_t pin;
  // Not 0: copy the weights to huge pages instead of reading them where they are mapped.
  uint32_t huge_pages;
  // Positions of cache over all sequences; 0 for one context, of a service for sixteen. Memory is taken as they are filled.
  size_t positions;
} mansard_engine_options;

// Facts about a model.
typedef struct {
  // Most tokens of a prompt and its answer together; of an encoder, of a text.
  size_t context;
  // Tokens are below that.
  size_t vocab;
  // Floats of a row that mansard_logits writes: the vocabulary, or an encoder's hidden width.
  size_t row;
  // Floats of an embedding; 0 where the model generates text.
  size_t embedding;
  // Not 0: it embeds text and generates none.
  uint32_t encoder;
  // Not 0: it has a tokenizer.
  uint32_t tokenizer;
  // Not 0: it has a chat template.
  uint32_t chat_template;
  // `llama`, `bert`...; ends with a zero byte, and is cut where it is longer.
  char architecture[64];
} mansard_facts;

// A turn of a conversation.
typedef struct {
  // `system`, `user` or `assistant`.
  const char *role;
  // What was said.
  const char *content;
} mansard_message;

// What to generate. Begin with what mansard_options_default writes.
typedef struct {
  // Most tokens of an answer.
  uint32_t max_tokens;
  // Answers to the prompt, each with random numbers of its own.
  uint32_t choices;
  // Divides logits; 0 takes the likeliest token.
  float temperature;
  // Likeliest tokens kept; 0 keeps all.
  uint32_t top_k;
  // Mass kept; 1 keeps all.
  float top_p;
  // Least probability kept, as a share of the likeliest's; 0 keeps all.
  float min_p;
  // Mass kept of the tokens whose surprise is nearest to the expected; 1 keeps all.
  float typical;
  // Divides positive and multiplies negative logits of recent tokens; 1 changes nothing.
  float repetition_penalty;
  // Tokens that count as recent, the prompt's included.
  uint32_t repetition_window;
  // Taken off a token's logit for each time it was generated.
  float frequency_penalty;
  // Taken off a token's logit if it was generated at all.
  float presence_penalty;
  // Start of the random numbers. The same seed gives the same answer, whatever else runs.
  uint64_t seed;
  // Tokens whose logits are changed.
  const uint32_t *bias_tokens;
  // By how much, for each of them.
  const float *biases;
  // How many they are.
  size_t bias_count;
  // Texts that end an answer, and are no part of it.
  const char *const *stop;
  // How many they are.
  size_t stop_count;
  // Not 0: go on where the model would end.
  uint32_t ignore_end;
  // Log probabilities that are told with each token: its own and those of so many of the likeliest; -1 for none.
  int32_t logprobs;
  // What an answer has to look like: MANSARD_TEXT, MANSARD_JSON... Tokens that cannot go on like that are not drawn. The model
  // must have a vocabulary of bytes, which byte-level BPE and SentencePiece are.
  uint32_t format;
  // The schema, regular expression or grammar that `format` speaks of; not read for MANSARD_TEXT and MANSARD_JSON.
  const char *grammar;
  // Who asks: those who have fewest answers on their way come first.
  uint64_t client;
} mansard_options;

// A token and its log probability, in nats.
typedef struct {
  // The token.
  uint32_t token;
  // Its log probability, before temperature, penalties and filters.
  float logprob;
} mansard_likely;

// What became of a request. What it points to is there until the next event of the same request, or the request is freed.
typedef struct {
  // What it tells.
  mansard_kind kind;
  // Of which answer.
  uint32_t choice;
  // Of MANSARD_TOKEN: its id.
  uint32_t token;
  // Of MANSARD_DONE: why.
  mansard_finish finish;
  // Of MANSARD_FAILED: what.
  mansard_status status;
  // UTF-8, whole characters, with a zero byte after it; empty while a character is unfinished or a stop text may have begun.
  const char *text;
  // Its bytes.
  size_t text_bytes;
  // Of MANSARD_TOKEN, where asked for: the token's log probability.
  float logprob;
  // The likeliest tokens, likeliest first.
  const mansard_likely *top;
  // How many they are.
  size_t top_count;
  // Of MANSARD_DONE: tokens of the prompt.
  size_t prompt_tokens;
  // Of those, what other requests had computed.
  size_t cached_tokens;
  // Tokens of this answer; one that ends the text not counted.
  size_t generated_tokens;
} mansard_event;

// A function of the caller's that hears of events. It gives 0 to end the request, and must not throw.
typedef int (*mansard_sink)(const mansard_event *event, void *user);

// How requests are run together. All zero: the defaults.
typedef struct {
  // How the model is run.
  mansard_engine_options engine;
  // Most answers on their way at once; 0 for as many as a step has room for.
  uint32_t running;
  // Most requests that wait; 0 for 256.
  uint32_t queue;
  // Most tokens of a prompt that run at once beside others' answers, 64, 128, 256...; 0 for 128.
  uint32_t piece;
  // Most tokens that are guessed by what came before and checked in one step. Answers stay the same.
  uint32_t guesses;
  // Not 0: keep nothing of a prompt for others that begin like it.
  uint32_t no_sharing;
} mansard_service_options;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Makes an engine. `options` may be null. Any thread.
//
// `options` is null or one; `engine` is null or a place.
mansard_status mansard_engine_new(const mansard_model *model,
                                  const mansard_engine_options *options,
                                  mansard_engine **engine);

// Frees an engine; null is none. Any thread.
mansard_status mansard_engine_free(mansard_engine *engine);

// Writes what the model says of tokens at the beginning of a context: f32 [rows, mansard_facts.row], row by row, and how many
// floats that are. `rows` is MANSARD_LAST_ROW or MANSARD_ALL_ROWS; an encoder's rows are its last hidden state, of all tokens.
// With too little room only the number is written, and MANSARD_TOO_SMALL comes back, before anything is computed. Any
// thread; calls with one engine wait for one another.
//
// `tokens` are `count`; `output` has room for `capacity`; `written` is null or a place.
mansard_status mansard_logits(mansard_engine *engine,
                              const uint32_t *tokens,
                              size_t count,
                              uint32_t rows,
                              float *output,
                              size_t capacity,
                              size_t *written);

// Embeds texts with an encoder: f32 [texts, mansard_facts.embedding], mean-pooled and normalized, and how many floats that
// are. `tokens` are those of all texts, one after another, and `counts` how many each has. As many texts as a step has room
// for run at once. With too little room it does as mansard_logits. Any thread; calls with one engine wait for one another.
//
// `counts` are `texts`, and `tokens` their sum; `output` has room for `capacity`; `written` is null or a place.
mansard_status mansard_embed(mansard_engine *engine,
                             const uint32_t *tokens,
                             const size_t *counts,
                             size_t texts,
                             float *output,
                             size_t capacity,
                             size_t *written);

// Opens and checks the artifact at `path`. `abi` is MANSARD_ABI_VERSION, by which a header that does not fit the library is
// found out. `flags` is 0 or MANSARD_TRUST_WEIGHTS. Any thread.
//
// `path` is null or text; `model` is null or a place.
mansard_status mansard_model_open(uint32_t abi,
                                  const char *path,
                                  uint32_t flags,
                                  mansard_model **model);

// Opens and checks an artifact that lies in memory, from a multiple of 4096 on, where it stays unchanged for as long as the
// program runs: nothing is copied. `name` stands for its path in messages. The rest is as for mansard_model_open. Any thread.
//
// `name` is null or text; `bytes` is null or so many that never change; `model` is null or a place.
mansard_status mansard_model_open_memory(uint32_t abi,
                                         const char *name,
                                         const void *bytes,
                                         size_t size,
                                         uint32_t flags,
                                         mansard_model **model);

// Frees a model; null is none. What was made of it goes on. Any thread.
mansard_status mansard_model_free(mansard_model *model);

// Writes facts about a model. Any thread.
//
// `facts` is null or a place.
mansard_status mansard_model_facts(const mansard_model *model, mansard_facts *facts);

// Writes the tokens of a text and their number. `special` is not 0 for plain text, around which the model wants special
// tokens, and 0 for text that has them, as that of mansard_chat_prompt. With too little room nothing but the number is
// written, and MANSARD_TOO_SMALL comes back. Any thread.
//
// `input` is null or text; `tokens` has room for `capacity`; `count` is null or a place.
mansard_status mansard_encode(const mansard_model *model,
                              const char *input,
                              uint32_t special,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *count);

// Writes the text of tokens, without special ones, a zero byte after it, and its bytes without that. With too little room
// only the bytes needed, that one included, are written, and MANSARD_TOO_SMALL comes back. Any thread.
//
// `tokens` are `count`; `output` has room for `capacity` bytes; `bytes` is null or a place.
mansard_status mansard_decode(const mansard_model *model,
                              const uint32_t *tokens,
                              size_t count,
                              char *output,
                              size_t capacity,
                              size_t *bytes);

// Writes the prompt that the model's chat template makes of a conversation, up to where the answer begins, like
// mansard_decode. Any thread.
//
// `messages` are `count`; `output` has room for `capacity` bytes; `bytes` is null or a place.
mansard_status mansard_chat_prompt(const mansard_model *model,
                                   const mansard_message *messages,
                                   size_t count,
                                   char *output,
                                   size_t capacity,
                                   size_t *bytes);

// Writes the defaults: 256 tokens, one answer, temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, seed 0. Any thread.
//
// `options` is null or a place for them.
mansard_status mansard_options_default(mansard_options *options);

// Asks for answers to a prompt, and comes back at once; mansard_next waits for their events. `options` may be null. Any thread.
//
// `tokens` are `count`; `options` is null or one; `request` is null or a place.
mansard_status mansard_submit(mansard_service *service,
                              const uint32_t *tokens,
                              size_t count,
                              const mansard_options *options,
                              mansard_request **request);

// Asks for answers to a prompt, and comes back at once; `sink` hears of their events, on the service's thread, which goes on
// when it returns: it must not block. It is not called any more once mansard_request_free has returned. Any thread.
//
// `tokens` are `count`; `options` is null or one; `sink` may be called from another thread, with `user`; `request` is null or
// a place.
mansard_status mansard_submit_to(mansard_service *service,
                                 const uint32_t *tokens,
                                 size_t count,
                                 const mansard_options *options,
                                 mansard_sink sink,
                                 void *user,
                                 mansard_request **request);

// Asks for answers to a prompt, and gives their events to `sink` as they come, on the calling thread; comes back when all is
// done, or `sink` gave 0. What fails comes back as a status. `options` may be null. Any thread, but not from a function that
// hears of events.
//
// `tokens` are `count`; `options` is null or one; `sink` may be called with `user`.
mansard_status mansard_generate(mansard_service *service,
                                const uint32_t *tokens,
                                size_t count,
                                const mansard_options *options,
                                mansard_sink sink,
                                void *user);

// Waits for a request's next event, at most so many milliseconds; MANSARD_FOREVER for as long as it takes. Where none came, it
// is MANSARD_NOTHING; after the last, MANSARD_END, again and again. What fails comes back as a status. Any thread, but not
// from a function that hears of events; calls with one request wait for one another.
//
// `event` is null or a place.
mansard_status mansard_next(mansard_request *request,
                            uint32_t milliseconds,
                            mansard_event *event);

// Ends a request; whoever waits for its events gets MANSARD_END soon. It is to be freed nonetheless. Any thread.
mansard_status mansard_cancel(mansard_request *request);

// Ends a request and frees it; null is none. Its function is not called any more once this has returned, but for the call that
// this comes from. Any thread.
mansard_status mansard_request_free(mansard_request *request);

// Starts a service for a model that generates text. `options` may be null. Any thread.
//
// `options` is null or one; `service` is null or a place.
mansard_status mansard_service_start(const mansard_model *model,
                                     const mansard_service_options *options,
                                     mansard_service **service);

// Takes no more requests, and returns when those on their way are done; after `milliseconds` those that are not fail. Any
// thread, but not from a function that hears of events.
mansard_status mansard_service_drain(mansard_service *service,
                                     uint32_t milliseconds);

// Ends a service and frees it; null is none. Requests on their way fail, and are to be freed nonetheless. Any thread, but not
// from a function that hears of events.
mansard_status mansard_service_free(mansard_service *service);

// The version of the library: MANSARD_ABI_VERSION of the header that it belongs to. Any thread.
uint32_t mansard_abi_version(void);

// The version of Mansard, as text. Any thread.
const char *mansard_version(void);

// What the last call that failed on the calling thread says: one sentence with its places, in UTF-8. Empty where none has
// failed. It stays until another call fails on the same thread.
const char *mansard_error(void);

// What to try after the last call that failed on the calling thread; empty where nothing is known. It stays as long as the
// message.
const char *mansard_help(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MANSARD_H */
