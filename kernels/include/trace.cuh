// The stages of attention, stored as a kernel computes them, for bisection.
//
// A kernel takes TRACE_PARAM as its last parameter and wraps each store in TRACE(...). Without FLASHCORE_TRACE both are
// nothing, so the production cubin holds no trace code. Scores and maxima are stored in natural units (softmax_scale
// applied), whatever units the kernel works in. Pages are the kernel's own key tiles.
#pragma once
#include "attention.cuh"

#ifdef FLASHCORE_TRACE

struct TraceBuffers {
  float* scores;   // [batch, num_heads_q, seqlen_q, seqlen_k]
  float* row_max;  // [batch, num_heads_q, pages, seqlen_q]
  float* rescale;  // [batch, num_heads_q, pages, seqlen_q]
  float* probs;    // [batch, num_heads_q, seqlen_q, seqlen_k]
  float* row_sum;  // [batch, num_heads_q, pages, seqlen_q]
  float* accum;    // [batch, num_heads_q, pages, padded_rows, HEAD_DIM]
  int pages;
  int padded_rows;  // seqlen_q rounded up to whole query tiles, so that whole fragments can be stored
};

#define TRACE_PARAM , const TraceBuffers trace
#define TRACE(...) __VA_ARGS__

// Where the stages of one query row lie.
struct TraceRow {
  Index scores, page_row, accum;
  const TraceBuffers& trace;
  const AttentionParams& params;

  __device__ TraceRow(const TraceBuffers& trace, const AttentionParams& params, int batch, int head, int row)
      : trace(trace), params(params) {
    const Index batch_head = Index(batch) * params.num_heads_q + head;
    scores = (batch_head * params.seqlen_q + row) * params.seqlen_k;
    page_row = batch_head * trace.pages * params.seqlen_q + row;
    accum = (batch_head * trace.pages * trace.padded_rows + row) * HEAD_DIM;
  }
  __device__ TraceRow(const TraceBuffers& trace, const AttentionParams& params, const Tile& tile, int row)
      : TraceRow(trace, params, tile.batch, tile.head, row) {}
  __device__ void score(int key, float value) const { trace.scores[scores + key] = value; }
  __device__ void prob(int key, float value) const { trace.probs[scores + key] = value; }
  __device__ void row_max(int page, float value) const {
    trace.row_max[page_row + Index(page) * params.seqlen_q] = value;
  }
  __device__ void rescale(int page, float value) const {
    trace.rescale[page_row + Index(page) * params.seqlen_q] = value;
  }
  __device__ void row_sum(int page, float value) const {
    trace.row_sum[page_row + Index(page) * params.seqlen_q] = value;
  }
  __device__ float* accum_row(int page) const {
    return trace.accum + accum + Index(page) * trace.padded_rows * HEAD_DIM;
  }
};

#else

#define TRACE_PARAM
#define TRACE(...)

#endif
