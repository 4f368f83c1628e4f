// The logits of llama.cpp's library, which llama-server does not give: of every position of a text,
// and the greedy text that follows.
//
//     llama-logits MODEL.gguf COUNT CONTROL.f32 ID... > OUTPUT
//
// CONTROL.f32: one row of the hidden size for each layer but the first, float32; "-" for none.
// OUTPUT: the logits (IDs, vocabulary) as float32, then at most COUNT ids as int32.
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static void fail(const char * what) {
    std::fprintf(stderr, "llama-logits: %s\n", what);
    std::exit(1);
}

static void only_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int main(int argc, char ** argv) {
    if (argc < 5) fail("expected MODEL COUNT CONTROL ID...");
    llama_log_set(only_errors, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail("the model could not be loaded");
    const int32_t count = std::atoi(argv[2]);
    std::vector<llama_token> ids;
    for (int i = 4; i < argc; i++) ids.push_back(std::atoi(argv[i]));

    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) fail("no context");

    const std::string control = argv[3];
    if (control != "-") {
        std::ifstream file(control, std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
        const int32_t layers = llama_model_n_layer(model), size = llama_model_n_embd(model);
        if (bytes.size() != sizeof(float) * (layers - 1) * size) fail("CONTROL has another size");
        const auto * rows = reinterpret_cast<const float *>(bytes.data());
        if (llama_set_adapter_cvec(context, rows, bytes.size() / sizeof(float), size, 1, layers - 1))
            fail("the control vector was refused");
    }

    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int32_t words = llama_vocab_n_tokens(vocab);
    llama_batch batch = llama_batch_init(512, 0, 1);
    int32_t position = 0;
    // Puts ids into the context; their logits are read with llama_get_logits_ith.
    auto decode = [&](const std::vector<llama_token> & tokens) {
        batch.n_tokens = 0;
        for (llama_token token : tokens) {
            const int32_t i = batch.n_tokens++;
            batch.token[i] = token;
            batch.pos[i] = position++;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_decode(context, batch)) fail("decoding failed");
    };
    decode(ids);
    for (size_t i = 0; i < ids.size(); i++)
        std::fwrite(llama_get_logits_ith(context, i), sizeof(float), words, stdout);
    int32_t last = ids.size() - 1;
    for (int32_t written = 0; written < count; written++) {
        const float * logits = llama_get_logits_ith(context, last);
        const int32_t next = std::max_element(logits, logits + words) - logits;
        std::fwrite(&next, sizeof(next), 1, stdout);
        if (llama_vocab_is_eog(vocab, next)) break;
        decode({next});
        last = 0;
    }
}
