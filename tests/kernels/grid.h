/* The place of a thread of a shim in its grid, and the barrier of its block: part of device.h, on a
 * CPU. Included within namespace fastmp after Block. */

struct Here {
  int32_t thread, index, blocks, cluster;
  Block* block;
};
static thread_local Here here;

FASTMP_DEVICE int32_t thread() {
  return here.thread;
}
FASTMP_DEVICE int32_t block() {
  return here.index;
}
FASTMP_DEVICE int32_t blocks() {
  return here.blocks;
}
FASTMP_DEVICE void sync_block() {
  here.block->all.arrive_and_wait();
}
