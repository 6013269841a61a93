/* Runs a decoded kernel (see machine.py): all threads of a program in lockstep, one instruction after another.
   A register is a row: its value in every thread, side by side, so that most instructions are vectorised loops. */
#include "operations.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  u16 op;
  u8 width;      /* bytes of the result, or of one element of a memory access */
  u8 count;      /* elements of a memory access */
  u8 guarded;    /* 0 always, 1 where the guard is true, 2 where it is false */
  u8 flags;      /* of an instruction that is not elementwise */
  u32 guard, dst, a, b, c;
  u32 vector[8]; /* registers of a memory access, ldmatrix or stmatrix */
  s64 offset;    /* of an address, or the target of a branch */
} Instruction;

typedef struct { u64 low, high; } Range; /* memory that the kernel was given */
typedef struct { u32 writing, reading, written, was_read; u16 writer, reader; } Cell; /* 2 bytes of global memory */
typedef struct { u32 written, was_read; u16 writer, reader; } SharedCell;             /* 1 byte of shared memory */

typedef struct {
  const Instruction *code;
  u32 length, threads;
  u8 *rows;
  u32 register_bytes;             /* the rows of registers, which start as NaN in every program */
  u32 ctaid[3], nctaid[3];        /* rows of these special registers */
  u32 grid[3], shared_bytes;
  const u64 *params;
  const Range *ranges;
  u32 n_ranges, check_races;
  u64 most_steps;                 /* of one program */
  const char *problem;            /* what went wrong, or NULL */
  u64 address;
  u32 program, thread, at;        /* where: program, thread, instruction */
} Run;

enum { PAGE = 4096, BUCKETS = 1 << 16, MOST_PAGES = 1 << 14, MOST_SHARED = 1 << 18, MOST_THREADS = 1024 };
enum { NOBODY = 0xffff, WARP = 1024, PROGRAM = 2048 }; /* who read: one thread, WARP + number of a warp, or several */
typedef struct Page { u64 number; struct Page *next; Cell cells[PAGE / 2]; } Page;

static u8 shared[MOST_SHARED] __attribute__((aligned(1024)));
static SharedCell shared_cells[MOST_SHARED];
static u64 nowhere[8];
static Page *pages[BUCKETS], *last_page;
static u32 n_pages, last_range, now, last_barrier, last_warp_barrier;

static void fail(Run *r, const char *problem, u64 address, u32 thread) {
  if (r->problem) return;
  r->problem = problem, r->address = address, r->thread = thread;
}

/* Whether nothing orders thread l after what `who` did at time `then`: no barrier since, no barrier of its warp. */
static inline int unordered(u32 then, u16 who, u32 l) {
  if (who == NOBODY || then <= last_barrier || who == l) return 0;
  if (who >= PROGRAM) return 1;
  u32 warp = who >= WARP ? who - WARP : who / 32u;
  return warp != l / 32u || then > last_warp_barrier;
}

/* One access to a cell by thread l. `same`: the write changes nothing, so two threads may do it at once. */
static inline const char *ordered(u32 *written, u16 *writer, u32 *was_read, u16 *reader, u32 l, int write, int same) {
  if (unordered(*written, *writer, l) && !(write && same && *written == now))
    return write ? "two threads of a program write here without a barrier between them"
                 : "a thread reads what another thread of its program wrote, without a barrier between them";
  if (write) {
    if (unordered(*was_read, *reader, l))
      return "a thread writes what another thread of its program read, without a barrier between them";
    *written = now, *writer = (u16)l;
    return NULL;
  }
  if (!unordered(*was_read, *reader, l)) *reader = (u16)l;
  else *reader = *reader < PROGRAM && (*reader >= WARP ? *reader - WARP : *reader / 32u) == l / 32u ? WARP + l / 32u : PROGRAM;
  *was_read = now;
  return NULL;
}

static Cell *cell_at(Run *r, u64 address) {
  u64 number = address / PAGE;
  if (!last_page || last_page->number != number) {
    Page **bucket = &pages[(number * 2654435761u >> 7) % BUCKETS], *page = *bucket;
    while (page && page->number != number) page = page->next;
    if (!page) {
      page = n_pages < MOST_PAGES ? calloc(1, sizeof(Page)) : NULL;
      if (!page) { fail(r, "no memory left to note accesses in: make the test smaller", address, 0); return NULL; }
      for (int i = 0; i < PAGE / 2; i++) page->cells[i].writer = page->cells[i].reader = NOBODY;
      page->number = number, page->next = *bucket, *bucket = page, n_pages++;
    }
    last_page = page;
  }
  return &last_page->cells[address % PAGE / 2];
}

static void check_global(Run *r, u64 address, u32 size, u32 l, int write, const u8 *value) {
  u32 me = r->program + 1;
  for (u32 i = 0; i < size && !r->problem; i += 2) {
    Cell *cell = cell_at(r, address + i);
    if (!cell) return;
    const char *problem = NULL;
    if (cell->writing && cell->writing != me)
      problem = write ? "two programs write here" : "a program reads what another one writes";
    else if (write && cell->reading && cell->reading != me)
      problem = "a program writes what another one reads";
    else {
      if (cell->writing != me) cell->writer = NOBODY;
      if (cell->reading != me) { cell->reader = NOBODY; if (cell->reading) cell->reading = ~0u; }
      int same = write && !memcmp(value + i, (void *)(address + i), 2);
      problem = ordered(&cell->written, &cell->writer, &cell->was_read, &cell->reader, l, write, same);
      if (write) cell->writing = me;
      else if (!cell->reading) cell->reading = me;
    }
    if (problem) fail(r, problem, address + i, l);
  }
}

static inline u8 *global_memory(Run *r, u64 address, u32 size, u32 l, int write, const u8 *value) {
  if (address % size) { fail(r, "misaligned access", address, l); return (u8 *)nowhere; }
  if (address < r->ranges[last_range].low || address + size > r->ranges[last_range].high) {
    u32 i = 0;
    while (i < r->n_ranges && (address < r->ranges[i].low || address + size > r->ranges[i].high)) i++;
    if (i == r->n_ranges) { fail(r, write ? "write out of bounds" : "read out of bounds", address, l); return (u8 *)nowhere; }
    last_range = i;
  }
  if (r->check_races) check_global(r, address, size, l, write, value);
  return (u8 *)address;
}

static inline u8 *shared_memory(Run *r, u64 address, u32 size, u32 l, int write, const u8 *value) {
  if (address % size) { fail(r, "misaligned access to shared memory", address, l); return (u8 *)nowhere; }
  if (address + size > r->shared_bytes) { fail(r, "access beyond shared memory", address, l); return (u8 *)nowhere; }
  for (u32 i = 0; i < size; i++) {
    SharedCell *cell = &shared_cells[address + i];
    /* lanes of a warp may differ: LLVM fuses the product of a lane into the first step of a sum over lanes, after which
       Triton has every lane write "the" sum. One of them stays. */
    int same = write && (value[i] == shared[address + i] || cell->writer / 32u == l / 32u);
    const char *problem = ordered(&cell->written, &cell->writer, &cell->was_read, &cell->reader, l, write, same);
    if (problem) { fail(r, problem, address + i, l); break; }
  }
  return shared + address;
}

/* ---- instructions that are not elementwise */

static inline u32 bits32(const u8 *row, u32 l) { return ((const u32 *)row)[l]; }

static void access_memory(Run *r, const Instruction *i, const u8 *mask, int in_shared, int store) {
  u32 size = i->width * i->count;
  u8 value[64];
  now++;
  for (u32 l = 0; l < r->threads && !r->problem; l++) {
    if (mask && !mask[l]) continue;
    u64 address = in_shared ? (u32)(bits32(r->rows + i->a, l) + i->offset) : ((u64 *)(r->rows + i->a))[l] + i->offset;
    if (store)
      for (u32 k = 0; k < i->count; k++)
        memcpy(value + k * i->width, r->rows + i->vector[k] + l * i->width, i->width);
    u8 *p = (in_shared ? shared_memory : global_memory)(r, address, size, l, store, value);
    if (store) memcpy(p, value, r->problem ? 0 : size);
    else
      for (u32 k = 0; k < i->count; k++)
        memcpy(r->rows + i->vector[k] + l * i->width, p + k * i->width, i->width);
  }
}

/* ldmatrix and stmatrix: 8x8 matrices of 16 bits, the row addresses of matrix m in lanes 8m to 8m + 7. */
static void move_matrix(Run *r, const Instruction *i, int store) {
  int transposed = i->flags;
  now++;
  for (u32 w = 0; w < r->threads; w += 32)
    for (u32 m = 0; m < i->count; m++)
      for (u32 row = 0; row < 8; row++) {
        u32 address = bits32(r->rows + i->a, w + 8 * m + row) + (u32)i->offset;
        if (address % 16) return fail(r, "misaligned access to shared memory", address, w + 8 * m + row);
        for (u32 col = 0; col < 8; col++) {
          u32 lane = w + (transposed ? col * 4 + row / 2 : row * 4 + col / 2), half = (transposed ? row : col) % 2;
          u8 *reg = r->rows + i->vector[m] + 4 * lane + 2 * half;
          u8 *p = shared_memory(r, address + 2 * col, 2, lane, store, reg);
          if (r->problem) return;
          memcpy(store ? p : reg, store ? reg : p, 2);
        }
      }
}

enum { BFLY, UP, DOWN, IDX }; /* flags of shfl */
static void shuffle(Run *r, const Instruction *i) {
  u32 from[MOST_THREADS], *to = (u32 *)(r->rows + i->dst);
  memcpy(from, r->rows + i->a, 4 * r->threads);
  for (u32 l = 0; l < r->threads; l++) {
    u32 lane = l & 31, b = bits32(r->rows + i->b, l) & 31, c = bits32(r->rows + i->c, l);
    u32 segment = c >> 8 & 31, last = (lane & segment) | (c & 31 & ~segment), source = lane;
    int inside = 0;
    switch (i->flags) {
    case BFLY: source = lane ^ b; inside = source <= last; break;
    case UP: source = lane - b; inside = (s32)source >= (s32)last; break;
    case DOWN: source = lane + b; inside = source <= last; break;
    default: source = (lane & segment) | (b & ~segment); inside = source <= last;
    }
    to[l] = from[(l & ~31u) + (inside ? source : lane)];
    if (i->vector[0]) (r->rows + i->vector[0])[l] = (u8)inside;
  }
}

static void load_parameter(Run *r, const Instruction *i) {
  u32 above = i->flags ? 64 - 8 * i->flags : 0; /* flags: bytes of a signed parameter */
  u64 value = (u64)((s64)(r->params[i->offset] << above) >> above);
  for (u32 l = 0; l < r->threads; l++) memcpy(r->rows + i->dst + l * i->width, &value, i->width);
}

static void barrier(void) { last_barrier = last_warp_barrier = now; }

static void blend(u8 *to, const u8 *from, const u8 *mask, u32 width, u32 threads) {
  for (u32 l = 0; l < threads; l++)
    if (mask[l]) memcpy(to + l * width, from + l * width, width);
}

enum {
#define NAME(name, ...) OP_##name,
  ELEMENTWISE(NAME) OP_bra, OP_ret, OP_bar_sync, OP_bar_warp_sync, OP_ld_param, OP_ld_global, OP_ld_shared,
  OP_st_global, OP_st_shared, OP_ldmatrix, OP_stmatrix, OP_shfl, N_OPERATIONS
};
#define QUOTED(name, ...) #name,
static const char *names[] = {
  ELEMENTWISE(QUOTED) "bra", "ret", "bar_sync", "bar_warp_sync", "ld_param", "ld_global", "ld_shared",
  "st_global", "st_shared", "ldmatrix", "stmatrix", "shfl"
};
#define SIZES(name, D, A, B, C, ...) {sizeof(D), sizeof(A), sizeof(B), sizeof(C)},
static const u8 sizes[][4] = {ELEMENTWISE(SIZES)}; /* of the result and the operands; 1 as well where there is none */
u32 operation_size(u32 i, u32 operand) { return i < OP_bra ? sizes[i][operand] : 0; }
const char *operation_name(u32 i) { return i < N_OPERATIONS ? names[i] : NULL; }

static void elementwise(const Instruction *i, u8 *rows, u8 *dst, u32 threads) {
  switch (i->op) {
#define CASE(name, D, A, B, C, ...) \
  case OP_##name: \
    for (u32 w = 0; w < threads; w += 32) _Pragma("GCC ivdep") for (u32 l = w; l < w + 32; l++) { /* a warp: unrolled */ \
      A a = ((const A *)(rows + i->a))[l]; B b = ((const B *)(rows + i->b))[l]; C c = ((const C *)(rows + i->c))[l]; \
      (void)a, (void)b, (void)c; \
      ((D *)dst)[l] = __VA_ARGS__; \
    } \
    break;
    ELEMENTWISE(CASE)
  }
}

/* Where to go on after a branch, or -1 if the threads of the program part. */
static s64 branch(Run *r, const Instruction *i, const u8 *mask, u32 pc) {
  u32 taken = 0;
  for (u32 l = 0; l < r->threads; l++) taken += mask ? mask[l] : 1;
  if (taken && taken < r->threads) fail(r, "the threads of a program part at a branch, which is not supported", 0, 0);
  return taken ? i->offset : pc;
}

static void run_program(Run *r) {
  u8 negated[MOST_THREADS], result[8 * MOST_THREADS];
  u32 pc = 0;
  for (u64 step = 0; pc < r->length && !r->problem; step++) {
    const Instruction *i = &r->code[r->at = pc++];
    const u8 *mask = i->guarded ? r->rows + i->guard : NULL;
    if (i->guarded == 2) {
      for (u32 l = 0; l < r->threads; l++) negated[l] = !mask[l];
      mask = negated;
    }
    if (i->op < OP_bra) {
      elementwise(i, r->rows, mask ? result : r->rows + i->dst, r->threads);
      if (mask) blend(r->rows + i->dst, result, mask, i->width, r->threads);
      continue;
    }
    switch (i->op) {
    case OP_bra: pc = (u32)branch(r, i, mask, pc); break;
    case OP_ret: pc = r->length; break;
    case OP_bar_sync: barrier(); break;
    case OP_bar_warp_sync: last_warp_barrier = now; break;
    case OP_ld_param: load_parameter(r, i); break;
    case OP_ld_global: access_memory(r, i, mask, 0, 0); break;
    case OP_ld_shared: access_memory(r, i, mask, 1, 0); break;
    case OP_st_global: access_memory(r, i, mask, 0, 1); break;
    case OP_st_shared: access_memory(r, i, mask, 1, 1); break;
    case OP_ldmatrix: move_matrix(r, i, 0); break;
    case OP_stmatrix: move_matrix(r, i, 1); break;
    case OP_shfl: shuffle(r, i); break;
    }
    if (step > r->most_steps) fail(r, "the program does not end", 0, 0);
  }
}

static void fill(Run *r, u32 row, u32 value) {
  for (u32 l = 0; row && l < r->threads; l++) ((u32 *)(r->rows + row))[l] = value;
}

void run(Run *r) {
  u64 programs = (u64)r->grid[0] * r->grid[1] * r->grid[2];
  r->problem = NULL, last_page = NULL, n_pages = 0, last_range = 0, now = last_barrier = last_warp_barrier = 0;
  for (u32 i = 0; i < r->shared_bytes; i++) shared_cells[i].writer = shared_cells[i].reader = NOBODY;
  for (u64 p = 0; p < programs && !r->problem; p++) {
    r->program = (u32)p;
    memset(r->rows, 0xff, r->register_bytes);
    memset(shared, 0xff, r->shared_bytes);
    u32 at[3] = {p % r->grid[0], p / r->grid[0] % r->grid[1], p / r->grid[0] / r->grid[1]};
    for (int k = 0; k < 3; k++) fill(r, r->ctaid[k], at[k]), fill(r, r->nctaid[k], r->grid[k]);
    barrier();
    run_program(r);
  }
  for (u32 i = 0; i < BUCKETS && n_pages; i++)
    for (Page *page = pages[i], *next; page; page = next) next = page->next, free(page);
  memset(pages, 0, sizeof pages);
}

void set_noise(int on) { noise = on; }
