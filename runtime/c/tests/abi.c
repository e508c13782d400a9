/* What C programs do with mansard.h, right and wrong: abi MODEL BYTES. MODEL counts: after token n comes n + 1, modulo 8; so
 * does BYTES, whose tokens are bytes: the end, 1 2 3 4 { } ".
 * Exits with 0 where everything is as mansard.h says. Built and run by c.rs, with valgrind where there is one. */
#include "mansard.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(truth) \
  do { \
    if (!(truth)) { \
      fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #truth, mansard_error()); \
      exit(1); \
    } \
  } while (0)
#define OK(call) CHECK((call) == MANSARD_OK)
#define FAILS(call, expected, words) \
  do { \
    CHECK((call) == (expected)); \
    CHECK(strstr(mansard_error(), words)); \
  } while (0)

static mansard_model *model;
static const uint32_t PROMPT[] = {1, 2, 3};

static mansard_options greedy(uint32_t max_tokens) {
  mansard_options options;
  OK(mansard_options_default(&options));
  options.temperature = 0;
  options.max_tokens = max_tokens;
  return options;
}

static void opening(const char *path) {
  CHECK(mansard_abi_version() == MANSARD_ABI_VERSION && strlen(mansard_version()) >= 5);
  FAILS(mansard_model_open(MANSARD_ABI_VERSION + 65536, path, 0, &model), MANSARD_UNSUPPORTED, "mansard.h 2.0");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION - 65536, path, 0, &model), MANSARD_UNSUPPORTED, "mansard.h 2.0");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION + 1, path, 0, &model), MANSARD_UNSUPPORTED, "mansard.h 2.0");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION, NULL, 0, &model), MANSARD_USAGE, "path: expected a pointer, found null");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION, path, 0, NULL), MANSARD_USAGE, "model");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION, path, 8, &model), MANSARD_USAGE, "flags");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION, "/nonexistent", 0, &model), MANSARD_IO, "/nonexistent");
  FAILS(mansard_model_open(MANSARD_ABI_VERSION, "/etc/hostname", 0, &model), MANSARD_INPUT, "/etc/hostname");
  CHECK(strlen(mansard_help()) > 0);
  FAILS(mansard_model_open(MANSARD_ABI_VERSION, "\xff\xfe", 0, &model), MANSARD_INPUT, "UTF-8");
  OK(mansard_model_open(MANSARD_ABI_VERSION, path, 0, &model));
  mansard_facts facts;
  OK(mansard_model_facts(model, &facts));
  CHECK(facts.vocab == 8 && facts.row == 8 && facts.embedding == 0 && facts.context == 256);
  CHECK(!facts.encoder && facts.tokenizer && facts.chat_template && !strcmp(facts.architecture, "counter"));
  FAILS(mansard_model_facts(NULL, &facts), MANSARD_USAGE, "the handle of a model, found null");
  FAILS(mansard_model_facts(model, NULL), MANSARD_USAGE, "facts");
}

/* The same bytes in memory: nothing is copied, and every check is made. */
static void in_memory(const char *path) {
  FILE *file = fopen(path, "rb");
  CHECK(file && !fseek(file, 0, SEEK_END));
  size_t size = (size_t)ftell(file);
  rewind(file);
  char *bytes = aligned_alloc(4096, (size + 8191) / 4096 * 4096);
  CHECK(bytes && fread(bytes, 1, size, file) == size);
  fclose(file);
  mansard_model *other;
  OK(mansard_model_open_memory(MANSARD_ABI_VERSION, "mine", bytes, size, 0, &other));
  OK(mansard_model_free(other));
  FAILS(mansard_model_open_memory(MANSARD_ABI_VERSION, "mine", bytes, size - 1, 0, &other), MANSARD_INPUT, "mine");
  FAILS(mansard_model_open_memory(MANSARD_ABI_VERSION, "mine", bytes, 7, 0, &other), MANSARD_INPUT, "at least 8 bytes");
  FAILS(mansard_model_open_memory(MANSARD_ABI_VERSION, "mine", NULL, size, 0, &other), MANSARD_USAGE, "bytes");
  bytes[size - 1] ^= 1;
  FAILS(mansard_model_open_memory(MANSARD_ABI_VERSION, "mine", bytes, size, 0, &other), MANSARD_INPUT, "hash");
  bytes[size - 1] ^= 1;
  memmove(bytes + 64, bytes, size);
  FAILS(mansard_model_open_memory(MANSARD_ABI_VERSION, "mine", bytes + 64, size, 0, &other), MANSARD_INPUT, "4096");
  free(bytes);
}

static void text(void) {
  uint32_t tokens[8];
  size_t count = 99;
  OK(mansard_encode(model, "one two three", 1, tokens, 8, &count));
  CHECK(count == 3 && !memcmp(tokens, PROMPT, sizeof PROMPT));
  FAILS(mansard_encode(model, "one two three", 1, tokens, 2, &count), MANSARD_TOO_SMALL, "room for 3");
  CHECK(count == 3);
  FAILS(mansard_encode(model, "one two three", 1, NULL, 0, &count), MANSARD_TOO_SMALL, "room for 3");
  FAILS(mansard_encode(model, "one", 1, NULL, 8, &count), MANSARD_USAGE, "tokens");
  FAILS(mansard_encode(model, "one", 1, tokens, 8, NULL), MANSARD_USAGE, "number");
  FAILS(mansard_encode(model, NULL, 1, tokens, 8, &count), MANSARD_USAGE, "text");
  FAILS(mansard_encode(model, "one \xc3", 1, tokens, 8, &count), MANSARD_INPUT, "UTF-8");
  OK(mansard_encode(model, "", 0, tokens, 8, &count));
  CHECK(count == 0);
  char words[64];
  OK(mansard_decode(model, PROMPT, 3, words, sizeof words, &count));
  CHECK(!strcmp(words, "one two three") && count == 13);
  FAILS(mansard_decode(model, PROMPT, 3, words, 13, &count), MANSARD_TOO_SMALL, "room for 14");
  CHECK(count == 14);
  FAILS(mansard_decode(model, NULL, 3, words, sizeof words, &count), MANSARD_USAGE, "tokens");
  FAILS(mansard_decode(model, PROMPT, SIZE_MAX, words, sizeof words, &count), MANSARD_USAGE, "memory holds");
  OK(mansard_decode(model, NULL, 0, words, sizeof words, &count));
  CHECK(count == 0 && words[0] == 0);
  mansard_message turns[] = {{"user", "one"}, {"assistant", "two"}};
  OK(mansard_chat_prompt(model, turns, 2, words, sizeof words, &count));
  CHECK(!strcmp(words, "one two "));
  turns[1].role = NULL;
  FAILS(mansard_chat_prompt(model, turns, 2, words, sizeof words, &count), MANSARD_USAGE, "role");
}

static void numbers(void) {
  mansard_engine *engine;
  mansard_engine_options options = {.threads = 1};
  FAILS(mansard_engine_new(NULL, &options, &engine), MANSARD_USAGE, "model");
  OK(mansard_engine_new(model, &options, &engine));
  float rows[3 * 8];
  size_t written = 0;
  OK(mansard_logits(engine, PROMPT, 3, MANSARD_ALL_ROWS, rows, 24, &written));
  CHECK(written == 24 && rows[2] == 64 && rows[8 + 3] == 64 && rows[16 + 4] == 64 && rows[0] == 0);
  OK(mansard_logits(engine, PROMPT, 3, MANSARD_LAST_ROW, rows, 24, &written));
  CHECK(written == 8 && rows[4] == 64);
  FAILS(mansard_logits(engine, PROMPT, 3, MANSARD_ALL_ROWS, rows, 23, &written), MANSARD_TOO_SMALL, "room for 24");
  CHECK(written == 24);
  FAILS(mansard_logits(engine, PROMPT, 0, MANSARD_ALL_ROWS, rows, 24, &written), MANSARD_USAGE, "at least one token");
  FAILS(mansard_logits(engine, PROMPT, 3, 2, rows, 24, &written), MANSARD_USAGE, "rows");
  uint32_t wrong[] = {8};
  FAILS(mansard_logits(engine, wrong, 1, MANSARD_LAST_ROW, rows, 24, &written), MANSARD_USAGE, "tokens below 8");
  size_t counts[] = {3, SIZE_MAX};
  FAILS(mansard_embed(engine, PROMPT, counts, 1, rows, 24, &written), MANSARD_USAGE, "a counter model");
  FAILS(mansard_embed(engine, PROMPT, counts, 2, rows, 24, &written), MANSARD_USAGE, "counts");
  OK(mansard_engine_free(engine));
  FAILS(mansard_engine_free(engine), MANSARD_USAGE, "freed");
  FAILS(mansard_logits(engine, PROMPT, 3, MANSARD_ALL_ROWS, rows, 24, &written), MANSARD_USAGE, "freed");
  FAILS(mansard_engine_free((mansard_engine *)model), MANSARD_USAGE, "no such handle");
  FAILS(mansard_engine_free((mansard_engine *)rows), MANSARD_USAGE, "no such handle");
  options.threads = UINT32_MAX;
  CHECK(mansard_engine_new(model, &options, &engine) != MANSARD_OK);
}

struct heard {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  char text[256];
  size_t tokens, stop_after;
  mansard_kind last;
  mansard_event done;
  mansard_service *service;
  mansard_request *request;
  mansard_status inside[3];
};

static void prepare(struct heard *heard) {
  memset(heard, 0, sizeof *heard);
  pthread_mutex_init(&heard->lock, NULL);
  pthread_cond_init(&heard->changed, NULL);
}

static int hear(const mansard_event *event, void *user) {
  struct heard *heard = user;
  pthread_mutex_lock(&heard->lock);
  strncat(heard->text, event->text, sizeof heard->text - strlen(heard->text) - 1);
  heard->tokens += event->kind == MANSARD_TOKEN;
  heard->last = event->kind;
  if (event->kind == MANSARD_DONE) heard->done = *event;
  int more = !heard->stop_after || heard->tokens < heard->stop_after;
  if (!more) heard->last = MANSARD_END;
  pthread_cond_signal(&heard->changed);
  pthread_mutex_unlock(&heard->lock);
  return more;
}

static void wait_for_end(struct heard *heard) {
  pthread_mutex_lock(&heard->lock);
  while (heard->last != MANSARD_END && heard->last != MANSARD_FAILED) pthread_cond_wait(&heard->changed, &heard->lock);
  pthread_mutex_unlock(&heard->lock);
}

/* What waits for the service's thread is refused on it; a request may be freed there. */
static int misbehave(const mansard_event *event, void *user) {
  struct heard *heard = user;
  mansard_event other;
  if (event->kind == MANSARD_TOKEN && !heard->tokens++) {
    heard->inside[0] = mansard_service_free(heard->service);
    heard->inside[1] = mansard_next(heard->request, MANSARD_FOREVER, &other);
    heard->inside[2] = mansard_generate(heard->service, PROMPT, 3, NULL, hear, heard);
  }
  pthread_mutex_lock(&heard->lock);
  heard->last = event->kind;
  pthread_cond_signal(&heard->changed);
  pthread_mutex_unlock(&heard->lock);
  return 1;
}

static void answers(mansard_service *service) {
  struct heard heard;
  prepare(&heard);
  mansard_options options = greedy(3);
  OK(mansard_generate(service, PROMPT, 3, &options, hear, &heard));
  CHECK(heard.tokens == 3 && heard.last == MANSARD_END && strstr(heard.text, "four five six"));
  CHECK(heard.done.finish == MANSARD_MAX_TOKENS && heard.done.prompt_tokens == 3 && heard.done.generated_tokens == 3);
  prepare(&heard);
  heard.stop_after = 2;
  options.max_tokens = 200;
  OK(mansard_generate(service, PROMPT, 3, &options, hear, &heard));
  CHECK(heard.tokens == 2);

  prepare(&heard);
  OK(mansard_generate(service, PROMPT, 3, &options, hear, &heard));
  CHECK(heard.tokens == 4 && heard.done.finish == MANSARD_STOP_TOKEN);
  prepare(&heard);
  options.ignore_end = 1;
  options.max_tokens = 20;
  const char *stop[] = {"two three"};
  options.stop = stop;
  options.stop_count = 1;
  OK(mansard_generate(service, PROMPT, 3, &options, hear, &heard));
  CHECK(heard.done.finish == MANSARD_STOP_TEXT && strstr(heard.text, "one") && !strstr(heard.text, "two"));

  /* A bias decides; log probabilities are told. */
  options = greedy(1);
  uint32_t biased[] = {7};
  float biases[] = {100};
  options.bias_tokens = biased, options.biases = biases, options.bias_count = 1, options.logprobs = 2;
  mansard_request *request;
  mansard_event event;
  OK(mansard_submit(service, PROMPT, 3, &options, &request));
  OK(mansard_next(request, MANSARD_FOREVER, &event));
  CHECK(event.kind == MANSARD_TOKEN && event.token == 7 && event.top_count == 2 && event.top[0].token == 4);
  CHECK(fabsf(event.logprob + 64) < 0.01f && fabsf(event.top[0].logprob) < 0.01f);
  OK(mansard_next(request, MANSARD_FOREVER, &event));
  CHECK(event.kind == MANSARD_DONE);
  OK(mansard_next(request, MANSARD_FOREVER, &event));
  OK(mansard_next(request, 10, &event));
  CHECK(event.kind == MANSARD_END && event.text_bytes == 0 && event.text[0] == 0);
  OK(mansard_request_free(request));
  FAILS(mansard_next(request, 0, &event), MANSARD_USAGE, "freed");
  FAILS(mansard_request_free(request), MANSARD_USAGE, "freed");
}

static void batch(mansard_service *service) {
  enum { REQUESTS = 16 };
  mansard_request *requests[REQUESTS];
  for (uint32_t i = 0; i < REQUESTS; i++) {
    mansard_options options = greedy(2 + i % 3);
    uint32_t prompt[] = {i % 6};
    options.choices = 1 + i % 2, options.ignore_end = 1;
    OK(mansard_submit(service, prompt, 1, &options, &requests[i]));
  }
  for (uint32_t i = 0; i < REQUESTS; i++) {
    uint32_t tokens = 0, done = 0;
    mansard_event event;
    do {
      OK(mansard_next(requests[i], MANSARD_FOREVER, &event));
      if (event.kind == MANSARD_TOKEN && event.choice == 0) CHECK(event.token == (i % 6 + ++tokens) % 8);
      done += event.kind == MANSARD_DONE;
    } while (event.kind != MANSARD_END);
    CHECK(tokens == 2 + i % 3 && done == 1 + i % 2);
    OK(mansard_request_free(requests[i]));
  }
}

static void told(mansard_service *service) {
  struct heard heard;
  mansard_options options = greedy(3);
  mansard_event event;
  prepare(&heard);
  OK(mansard_submit_to(service, PROMPT, 3, &options, hear, &heard, &heard.request));
  wait_for_end(&heard);
  CHECK(strstr(heard.text, "four five six") && heard.last == MANSARD_END);
  FAILS(mansard_next(heard.request, 0, &event), MANSARD_USAGE, "its function");
  OK(mansard_request_free(heard.request));

  prepare(&heard);
  heard.service = service;
  OK(mansard_submit_to(service, PROMPT, 3, &options, misbehave, &heard, &heard.request));
  wait_for_end(&heard);
  for (int i = 0; i < 3; i++) CHECK(heard.inside[i] == MANSARD_USAGE);
  OK(mansard_request_free(heard.request));

  /* What makes no sense is told too; and freed at once, nobody is told any more. */
  prepare(&heard);
  options.temperature = -1;
  OK(mansard_submit_to(service, PROMPT, 3, &options, hear, &heard, &heard.request));
  wait_for_end(&heard);
  CHECK(heard.last == MANSARD_FAILED && strstr(heard.text, "temperature"));
  OK(mansard_request_free(heard.request));
  options = greedy(200), options.ignore_end = 1;
  for (int i = 0; i < 20; i++) {
    prepare(&heard);
    OK(mansard_submit_to(service, PROMPT, 3, &options, hear, &heard, &heard.request));
    OK(mansard_request_free(heard.request));
    size_t tokens = heard.tokens;
    CHECK(tokens <= 200);
    memset(&heard, 0xee, sizeof heard); /* a call now would crash */
  }
}

static void *next_in_thread(void *user) {
  mansard_event event;
  mansard_status status;
  do status = mansard_next(user, MANSARD_FOREVER, &event);
  while (status == MANSARD_OK && event.kind != MANSARD_END);
  return (void *)(intptr_t)status;
}

static void refusals(mansard_service *service) {
  mansard_request *request;
  mansard_event event;
  mansard_options options = greedy(4);
  struct heard heard;
  prepare(&heard);
  FAILS(mansard_submit(NULL, PROMPT, 3, NULL, &request), MANSARD_USAGE, "service");
  FAILS(mansard_submit(service, NULL, 3, NULL, &request), MANSARD_USAGE, "tokens");
  FAILS(mansard_submit(service, PROMPT, 3, NULL, NULL), MANSARD_USAGE, "request");
  FAILS(mansard_generate(service, PROMPT, 3, NULL, NULL, NULL), MANSARD_USAGE, "sink");
  FAILS(mansard_generate(service, PROMPT, 0, NULL, hear, &heard), MANSARD_USAGE, "at least one token");
  options.logprobs = -7;
  FAILS(mansard_submit(service, PROMPT, 3, &options, &request), MANSARD_USAGE, "logprobs");
  options = greedy(0);
  OK(mansard_submit(service, PROMPT, 3, &options, &request));
  FAILS(mansard_next(request, MANSARD_FOREVER, &event), MANSARD_USAGE, "at least one token");
  OK(mansard_next(request, MANSARD_FOREVER, &event));
  CHECK(event.kind == MANSARD_END);
  OK(mansard_request_free(request));
  options = greedy(4), options.choices = 0;
  FAILS(mansard_generate(service, PROMPT, 3, &options, hear, &heard), MANSARD_USAGE, "choices");
  options = greedy(4), options.stop_count = 1;
  FAILS(mansard_submit(service, PROMPT, 3, &options, &request), MANSARD_USAGE, "stop");
  const char *stop[] = {"\xff"};
  options.stop = stop;
  FAILS(mansard_submit(service, PROMPT, 3, &options, &request), MANSARD_INPUT, "stop");
  FAILS(mansard_options_default(NULL), MANSARD_USAGE, "options");

  /* Cancelled and freed while another thread waits. */
  options = greedy(200), options.ignore_end = 1;
  for (int freed = 0; freed < 2; freed++) {
    pthread_t thread;
    void *status;
    OK(mansard_submit(service, PROMPT, 3, &options, &request));
    CHECK(!pthread_create(&thread, NULL, next_in_thread, request));
    OK(freed ? mansard_request_free(request) : mansard_cancel(request));
    CHECK(!pthread_join(thread, &status));
    CHECK((intptr_t)status == MANSARD_OK || (freed && (intptr_t)status == MANSARD_USAGE));
    if (!freed) OK(mansard_request_free(request));
  }
}

static void formats(mansard_service *service, const char *bytes) {
  mansard_request *request;
  mansard_options options = greedy(8);
  options.format = MANSARD_JSON;
  FAILS(mansard_submit(service, PROMPT, 3, &options, &request), MANSARD_UNSUPPORTED, "vocabulary of bytes");

  OK(mansard_model_open(MANSARD_ABI_VERSION, bytes, 0, &model));
  OK(mansard_service_start(model, NULL, &service));
  OK(mansard_model_free(model));
  const struct { uint32_t format; const char *grammar, *said; } fine[] = {
    {MANSARD_TEXT, "(", "4{}\""}, {MANSARD_JSON, NULL, "{}"}, {MANSARD_REGEX, "[1-4]{2}", "41"},
    {MANSARD_SCHEMA, "{\"type\": \"integer\", \"minimum\": 12, \"maximum\": 13}", "12"}, {MANSARD_LARK, "start: \"4\" \"3\"", "43"},
  };
  for (size_t i = 0; i < sizeof fine / sizeof *fine; i++) {
    struct heard heard;
    prepare(&heard);
    options.format = fine[i].format, options.grammar = fine[i].grammar, options.choices = 1;
    OK(mansard_generate(service, PROMPT, 3, &options, hear, &heard));
    CHECK(!strcmp(heard.text, fine[i].said) && heard.done.finish == MANSARD_STOP_TOKEN);
  }
  const struct { uint32_t format; const char *grammar, *words; } wrong[] = {
    {MANSARD_SCHEMA, "{", "the schema: not JSON"}, {MANSARD_SCHEMA, "{\"type\": \"nothing\"}", "the schema: "},
    {MANSARD_SCHEMA, "{\"type\": \"integer\", \"minimum\": 3, \"maximum\": 2}", "the schema: "},
    {MANSARD_REGEX, "(", "the regular expression: "}, {MANSARD_LARK, "start: nothing", "the grammar: "},
    {MANSARD_REGEX, NULL, "grammar: expected a pointer, found null"}, {9, "", "format: expected MANSARD_TEXT to MANSARD_LARK, found 9"},
  };
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    options.format = wrong[i].format, options.grammar = wrong[i].grammar;
    FAILS(mansard_submit(service, PROMPT, 3, &options, &request), MANSARD_USAGE, wrong[i].words);
  }
  options.format = MANSARD_REGEX, options.grammar = "\xff";
  FAILS(mansard_submit(service, PROMPT, 3, &options, &request), MANSARD_INPUT, "UTF-8");
  OK(mansard_service_free(service));
}

static void *from_a_thread(void *service) {
  batch(service);
  FAILS(mansard_cancel(NULL), MANSARD_USAGE, "request");
  return NULL;
}

int main(int argc, char **argv) {
  CHECK(argc == 3 && !*mansard_error() && !*mansard_help());
  opening(argv[1]);
  in_memory(argv[1]);
  text();
  numbers();
  mansard_service *service, *full;
  mansard_service_options options = {.engine = {.threads = 2}};
  OK(mansard_service_start(model, &options, &service));
  OK(mansard_model_free(model)); /* what was made of it goes on */
  FAILS(mansard_model_free(model), MANSARD_USAGE, "freed");
  FAILS(mansard_service_start(model, &options, &full), MANSARD_USAGE, "freed");
  OK(mansard_model_free(NULL));
  answers(service);
  batch(service);
  told(service);
  refusals(service);
  formats(service, argv[2]);
  pthread_t threads[3];
  for (int i = 0; i < 3; i++) CHECK(!pthread_create(&threads[i], NULL, from_a_thread, service));
  for (int i = 0; i < 3; i++) CHECK(!pthread_join(threads[i], NULL));

  /* A queue that is full, and one that is closed. */
  OK(mansard_model_open(MANSARD_ABI_VERSION, argv[1], MANSARD_TRUST_WEIGHTS, &model));
  options.running = 1, options.queue = 1;
  OK(mansard_service_start(model, &options, &full));
  mansard_options longest = greedy(200);
  longest.ignore_end = 1;
  mansard_request *requests[64];
  int busy = 0;
  for (int i = 0; i < 64; i++) {
    requests[i] = NULL;
    mansard_status status = mansard_submit(full, PROMPT, 3, &longest, &requests[i]);
    CHECK(status == MANSARD_OK || (status == MANSARD_BUSY && strstr(mansard_error(), "try again in")));
    busy += status == MANSARD_BUSY;
  }
  CHECK(busy > 0);
  OK(mansard_service_drain(full, 60000));
  for (int i = 0; i < 64; i++) OK(mansard_request_free(requests[i]));
  FAILS(mansard_submit(full, PROMPT, 3, &longest, &requests[0]), MANSARD_CLOSED, "no more");
  OK(mansard_service_free(full));
  OK(mansard_service_free(service));
  FAILS(mansard_service_free(service), MANSARD_USAGE, "freed");
  OK(mansard_model_free(model));
  puts("fine");
  return 0;
}
