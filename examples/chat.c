/* A conversation at the terminal: chat m.mansard [most tokens of an answer]
 *
 *   make lib && cc examples/chat.c -Itarget/release/lib -Ltarget/release/lib -lmansard -lm -lpthread -o chat
 *
 * Linked with libmansard.so it wants -Wl,-rpath,$PWD/target/release/lib too. */
#include <mansard.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TURNS = 64 };

static void must(mansard_status status) {
  if (status == MANSARD_OK) return;
  fprintf(stderr, "error: %s\n", mansard_error());
  if (*mansard_help()) fprintf(stderr, "help: %s\n", mansard_help());
  exit(status);
}

/* A call without room says how much there should be. */
static size_t needed(mansard_status status, const size_t *count) {
  if (status != MANSARD_TOO_SMALL) must(status);
  return *count;
}

static void *memory(void *found) {
  if (!found) exit(MANSARD_IO);
  return found;
}

/* Shows what comes, and keeps it. */
static int show(const mansard_event *event, void *user) {
  char **answer = user;
  fwrite(event->text, 1, event->text_bytes, stdout);
  fflush(stdout);
  *answer = memory(realloc(*answer, strlen(*answer) + event->text_bytes + 1));
  strcat(*answer, event->text);
  return 1;
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: %s m.mansard [most tokens of an answer] < questions, one a line\n", argv[0]);
    return MANSARD_USAGE;
  }
  mansard_model *model;
  mansard_service *service;
  must(mansard_model_open(MANSARD_ABI_VERSION, argv[1], 0, &model));
  must(mansard_service_start(model, NULL, &service));
  mansard_message turns[MOST_TURNS];
  size_t count = 0;
  char line[4096];
  while (count + 2 <= MOST_TURNS && fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\n")] = 0;
    turns[count++] = (mansard_message){"user", memory(strdup(line))};
    size_t bytes, tokens;
    bytes = needed(mansard_chat_prompt(model, turns, count, NULL, 0, &bytes), &bytes);
    char *prompt = memory(malloc(bytes));
    must(mansard_chat_prompt(model, turns, count, prompt, bytes, &bytes));
    tokens = needed(mansard_encode(model, prompt, 0, NULL, 0, &tokens), &tokens);
    uint32_t *ids = memory(calloc(tokens + 1, sizeof *ids));
    must(mansard_encode(model, prompt, 0, ids, tokens, &tokens));

    mansard_options options;
    must(mansard_options_default(&options));
    options.max_tokens = argc > 2 ? (uint32_t)atoi(argv[2]) : 200;
    char *answer = memory(calloc(1, 1));
    must(mansard_generate(service, ids, tokens, &options, show, &answer));
    puts("");
    turns[count++] = (mansard_message){"assistant", answer};
    free(prompt);
    free(ids);
  }
  for (size_t i = 0; i < count; i++) free((char *)turns[i].content);
  must(mansard_service_free(service));
  must(mansard_model_free(model));
  return 0;
}
