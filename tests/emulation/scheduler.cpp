// Runs a grid on one thread of the host: a fiber for each CUDA thread, switched at barriers and shuffles only. It is
// compiled without instrumentation: under ThreadSanitizer nothing that it does orders the kernel's threads.
//
//   SHAREDNORM_EMULATED_SCHEDULE   forward (the default), reverse, or random:SEED: which thread goes on, and which
//                                  block comes next
//   SHAREDNORM_EMULATED_RESIDENT   how many blocks, or clusters, are on the device at a time (the default is 1)

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "emulated_cuda.h"
#include "fiber.h"

namespace {

constexpr unsigned warp_lanes = 32;
constexpr unsigned most_idle_rounds = 1u << 20;

enum class State { ready, barrier, warp, cluster, paused, ended };

struct Site {
    const char *file = nullptr;
    int line = 0;
    bool operator==(const Site &other) const { return line == other.line && !std::strcmp(file, other.file); }
};

struct Gang;
struct Block;

struct Lane {
    emu::Thread view;
    Block *block = nullptr;
    Fiber *fiber = nullptr;
    unsigned index = 0;  // within the block
    State state = State::ready;
    Site site;
    bool fenced = false;                   // a fence came after the last atomic: it makes the next one a release
    const void *atomics[4] = {};           // the latest since the last fence: the next one makes them acquires
    unsigned next_atomic = 0;
};

// Counts arrivals. Two tags alternate: a thread that is already on its way to the next barrier releases to the other.
struct Meeting {
    unsigned arrived = 0;
    unsigned round = 0;
    const void *tag(const char *tags) const { return tags + 8 * (round % 2); }
};

struct Warp {
    Meeting meeting;
    std::uint64_t slots[2][warp_lanes];
};

struct Block {
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    Meeting barrier;
    SharedMemory shared;
    const char *tags = nullptr;  // of this block alone, for as long as the grid runs
    Gang *gang = nullptr;
};

// The blocks that a cluster barrier holds together; a single block where there are no clusters.
struct Gang {
    std::vector<Block *> blocks;
    Meeting barrier;
    const char *tags = nullptr;
};

class Order {
public:
    Order() {
        const char *text = std::getenv("SHAREDNORM_EMULATED_SCHEDULE");
        const std::string schedule = text != nullptr && *text != '\0' ? text : "forward";
        if (schedule == "reverse") {
            reverse_ = true;
        } else if (schedule.rfind("random:", 0) == 0) {
            random_ = true;
            state_ = 2 * std::strtoull(schedule.c_str() + 7, nullptr, 10) + 1;
        } else if (schedule != "forward") {
            std::fprintf(stderr, "emulated CUDA: SHAREDNORM_EMULATED_SCHEDULE is '%s' (expected: forward, reverse, "
                                 "random:SEED)\n", schedule.c_str());
            std::abort();
        }
    }

    std::vector<unsigned> permutation(unsigned count) {
        std::vector<unsigned> order(count);
        for (unsigned i = 0; i < count; ++i) order[i] = reverse_ ? count - 1 - i : i;
        if (random_) {
            for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[below(i)]);
        }
        return order;
    }

    // Where to look first among count things, and in which direction to go on.
    unsigned first(unsigned count) { return random_ ? below(count) : reverse_ ? count - 1 : 0; }
    unsigned next(unsigned index, unsigned count) const {
        return reverse_ ? (index == 0 ? count - 1 : index - 1) : (index + 1 == count ? 0 : index + 1);
    }

private:
    unsigned below(unsigned count) {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<unsigned>((state_ >> 33) % count);
    }

    bool reverse_ = false;
    bool random_ = false;
    unsigned long long state_ = 1;
};

unsigned resident_gangs() {
    const char *text = std::getenv("SHAREDNORM_EMULATED_RESIDENT");
    const long count = text != nullptr && *text != '\0' ? std::strtol(text, nullptr, 10) : 1;
    return static_cast<unsigned>(std::max(1l, count));
}

const char *where(State state) {
    switch (state) {
        case State::barrier: return "waits at __syncthreads";
        case State::warp: return "waits at a shuffle or __syncwarp";
        case State::cluster: return "waits at a barrier of its cluster";
        case State::ended: return "has ended";
        default: return "runs";
    }
}

class Grid {
public:
    Grid(const EmuKernel &kernel, const EmuLaunch &launch);
    void run();

    void meet(Meeting &meeting, unsigned expected, State state, Site site, const char *tags);
    void pause();
    void end();
    Lane &lane() { return *running_; }
    [[noreturn]] void fail(const Lane &lane, const std::string &what) const;

    const EmuKernel &kernel;
    const EmuLaunch &launch;

private:
    using Wave = std::vector<std::unique_ptr<Block>>;

    void run_wave(const std::vector<unsigned> &gangs);
    std::unique_ptr<Block> make_block(unsigned index, Gang &gang);
    Lane *choose();
    bool wake_paused();
    void stand_still() const;
    std::string describe(const Lane &lane) const;

    unsigned threads_;
    unsigned cluster_;
    Order order_;
    Wave wave_;
    Wave spare_;
    std::vector<Gang> gangs_;
    std::vector<unsigned> ready_;  // a mask of lanes for each warp of the wave
    Lane *running_ = nullptr;
    unsigned alive_ = 0;
    unsigned idle_rounds_ = 0;
    std::size_t pairs_;  // of tags, for each block: its cluster's (of its first block), its own, and its warps'
    Tags tags_;
};

Grid *grid = nullptr;

void enter(void *argument) {
    (void)argument;
    Grid &it = *grid;
    after_switch(*it.lane().fiber);
    it.kernel.invoke(it.launch.arguments);
    it.end();
}

Grid::Grid(const EmuKernel &kernel, const EmuLaunch &launch)
    : kernel(kernel), launch(launch), threads_(launch.block[0] * launch.block[1] * launch.block[2]),
      cluster_(kernel.cluster),
      pairs_(2 + (threads_ + warp_lanes - 1) / warp_lanes),
      tags_(pairs_ * launch.grid[0] * launch.grid[1] * launch.grid[2]) {}

void Grid::run() {
    const unsigned blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    const unsigned resident = resident_gangs();
    const std::vector<unsigned> order = order_.permutation(blocks / cluster_);
    for (std::size_t first = 0; first < order.size(); first += resident) {
        const std::size_t last = std::min(order.size(), first + resident);
        run_wave(std::vector<unsigned>(order.begin() + static_cast<long>(first), order.begin() + static_cast<long>(last)));
    }
    acquire_tag(&tags_.end);
}

std::unique_ptr<Block> Grid::make_block(unsigned index, Gang &gang) {
    // Taken again, and freed only with the grid: ThreadSanitizer sees that the kernel's threads read in them.
    std::unique_ptr<Block> block = spare_.empty() ? std::make_unique<Block>() : std::move(spare_.back());
    if (!spare_.empty()) spare_.pop_back();
    block->barrier = Meeting{};
    block->gang = &gang;
    block->tags = tags_.pair(pairs_ * index + 1);
    block->lanes.assign(threads_, Lane{});
    block->warps.assign((threads_ + warp_lanes - 1) / warp_lanes, Warp{});
    block->shared.allocate(launch.shared_bytes);
    const uint3 position{index % launch.grid[0], index / launch.grid[0] % launch.grid[1],
                         index / launch.grid[0] / launch.grid[1]};
    for (unsigned t = 0; t < threads_; ++t) {
        Lane &lane = block->lanes[t];
        lane.block = block.get();
        lane.index = t;
        lane.view.thread = uint3{t % launch.block[0], t / launch.block[0] % launch.block[1],
                                 t / launch.block[0] / launch.block[1]};
        lane.view.block = position;
        lane.view.block_size = dim3(launch.block[0], launch.block[1], launch.block[2]);
        lane.view.grid_size = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
        lane.view.cluster_size = cluster_;
        lane.view.cluster_rank = index % cluster_;
        lane.view.shared = block->shared.data();
        lane.fiber = take_fiber(enter);
    }
    return block;
}

void Grid::run_wave(const std::vector<unsigned> &gangs) {
    gangs_.assign(gangs.size(), Gang{});
    for (std::size_t g = 0; g < gangs.size(); ++g) {
        gangs_[g].tags = tags_.pair(pairs_ * gangs[g] * cluster_);
        for (unsigned b = 0; b < cluster_; ++b) {
            wave_.push_back(make_block(gangs[g] * cluster_ + b, gangs_[g]));
            gangs_[g].blocks.push_back(wave_.back().get());
        }
    }
    const unsigned warps = (threads_ + warp_lanes - 1) / warp_lanes;
    ready_.assign(wave_.size() * warps, 0xffffffffu);
    if (threads_ % warp_lanes != 0) {
        for (std::size_t b = 0; b < wave_.size(); ++b) {
            ready_[(b + 1) * warps - 1] = (1u << threads_ % warp_lanes) - 1;
        }
    }
    alive_ = static_cast<unsigned>(wave_.size()) * threads_;
    while (alive_ > 0) {
        Lane *lane = choose();
        if (lane == nullptr) {
            if (!wake_paused()) stand_still();
            continue;
        }
        running_ = lane;
        emu::current = &lane->view;
        switch_to(*lane->fiber);
    }
    for (auto &block : wave_) {
        if (block->shared.overrun()) {
            fail(block->lanes[0], "a write behind the end of shared memory");
        }
        block->shared.release();
        for (Lane &lane : block->lanes) return_fiber(lane.fiber);
        spare_.push_back(std::move(block));
    }
    wave_.clear();
}

// The lane that goes on, taken out of the ready ones.
Lane *Grid::choose() {
    const unsigned warps = static_cast<unsigned>(ready_.size());
    const unsigned of_block = (threads_ + warp_lanes - 1) / warp_lanes;
    unsigned warp = order_.first(warps);
    for (unsigned tried = 0; tried < warps; ++tried, warp = order_.next(warp, warps)) {
        if (ready_[warp] == 0) continue;
        unsigned lane = order_.first(warp_lanes);
        while ((ready_[warp] >> lane & 1) == 0) lane = order_.next(lane, warp_lanes);
        ready_[warp] &= ~(1u << lane);
        return &wave_[warp / of_block]->lanes[warp % of_block * warp_lanes + lane];
    }
    return nullptr;
}

bool Grid::wake_paused() {
    const unsigned of_block = (threads_ + warp_lanes - 1) / warp_lanes;
    bool any = false;
    for (std::size_t b = 0; b < wave_.size(); ++b) {
        for (Lane &lane : wave_[b]->lanes) {
            if (lane.state != State::paused) continue;
            lane.state = State::ready;
            ready_[b * of_block + lane.index / warp_lanes] |= 1u << lane.index % warp_lanes;
            any = true;
        }
    }
    if (any && ++idle_rounds_ > most_idle_rounds) fail(*running_, "waits for something that never comes");
    return any;
}

std::string Grid::describe(const Lane &lane) const {
    const uint3 &t = lane.view.thread;
    const uint3 &b = lane.view.block;
    char text[256];
    std::snprintf(text, sizeof text, "block (%u,%u,%u), thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
    return text;
}

void Grid::fail(const Lane &lane, const std::string &what) const {
    std::fprintf(stderr, "emulated CUDA: kernel %s, %s: %s\n", kernel.name, describe(lane).c_str(), what.c_str());
    std::fflush(stderr);
    std::abort();
}

// No thread can go on: of the first block that still waits, name a waiting thread and one that is elsewhere.
void Grid::stand_still() const {
    for (const auto &block : wave_) {
        for (const Lane &waiting : block->lanes) {
            if (waiting.state == State::ended) continue;
            for (const Lane &other : block->lanes) {
                if (other.state == waiting.state) continue;
                fail(waiting, std::string("divergent barrier: it ") + where(waiting.state) + " (" + waiting.site.file +
                                  ":" + std::to_string(waiting.site.line) + "), " + describe(other) + " " +
                                  where(other.state));
            }
        }
    }
    for (const auto &block : wave_) {
        for (const Lane &waiting : block->lanes) {
            if (waiting.state != State::ended) fail(waiting, std::string("divergent barrier: it ") + where(waiting.state) +
                                                                 " for another block or warp that does not come");
        }
    }
    std::abort();  // unreachable: somebody is alive
}

void Grid::meet(Meeting &meeting, unsigned expected, State state, Site site, const char *tags) {
    Lane &me = *running_;
    me.site = site;
    const void *tag = tags != nullptr ? meeting.tag(tags) : nullptr;
    release_tag(tag);
    const unsigned of_block = (threads_ + warp_lanes - 1) / warp_lanes;
    idle_rounds_ = 0;
    ++meeting.arrived;
    me.state = state;
    if (meeting.arrived == expected) {
        meeting.arrived = 0;
        ++meeting.round;
        for (std::size_t b = 0; b < wave_.size(); ++b) {
            Block &block = *wave_[b];
            const bool here = state == State::cluster ? block.gang == me.block->gang : &block == me.block;
            if (!here) continue;
            for (Lane &lane : block.lanes) {
                if (state == State::warp && lane.index / warp_lanes != me.index / warp_lanes) continue;
                if (!(lane.site == site)) {
                    fail(me, std::string("divergent barrier: it waits at ") + site.file + ":" +
                                 std::to_string(site.line) + ", " + describe(lane) + " at " + lane.site.file + ":" +
                                 std::to_string(lane.site.line));
                }
                lane.state = State::ready;
                ready_[b * of_block + lane.index / warp_lanes] |= 1u << lane.index % warp_lanes;
            }
        }
    }
    switch_to_host(*me.fiber);
    acquire_tag(tag);
}

void Grid::pause() {
    running_->state = State::paused;
    switch_to_host(*running_->fiber);
}

void Grid::end() {
    Lane &me = *running_;
    me.state = State::ended;
    idle_rounds_ = 0;
    --alive_;
    release_tag(&tags_.end);
    leave(*me.fiber);
}

std::vector<const EmuKernel *> &kernels() {
    static std::vector<const EmuKernel *> all;
    return all;
}

void need_full_warp(unsigned mask) {
    Lane &me = grid->lane();
    if (mask != 0xffffffffu) grid->fail(me, "a shuffle or __syncwarp with a mask that is not full");
    if (me.block->lanes.size() % warp_lanes != 0) {
        grid->fail(me, "a full mask in a block of " + std::to_string(me.block->lanes.size()) +
                           " threads, which is no multiple of 32");
    }
}

}  // namespace

namespace emu {

const Thread *current = nullptr;

void block_barrier(const char *file, int line) {
    Block &block = *grid->lane().block;
    grid->meet(block.barrier, static_cast<unsigned>(block.lanes.size()), State::barrier, {file, line}, block.tags);
}

void cluster_barrier(const char *file, int line) {
    Gang &gang = *grid->lane().block->gang;
    const std::size_t threads = gang.blocks.size() * gang.blocks[0]->lanes.size();
    grid->meet(gang.barrier, static_cast<unsigned>(threads), State::cluster, {file, line}, gang.tags);
}

unsigned lane() { return grid->lane().index % warp_lanes; }

void warp_barrier(unsigned mask, const char *file, int line) {
    need_full_warp(mask);
    Lane &me = grid->lane();
    const unsigned index = me.index / warp_lanes;
    const char *tags = me.block->tags != nullptr ? me.block->tags + 16 * (1 + index) : nullptr;
    grid->meet(me.block->warps[index].meeting, warp_lanes, State::warp, {file, line}, tags);
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned from, const char *file, int line) {
    need_full_warp(mask);
    Lane &me = grid->lane();
    Warp &warp = me.block->warps[me.index / warp_lanes];
    // Two sets of slots: a lane writes the first again only after all have read it.
    std::uint64_t *slots = warp.slots[warp.meeting.round % 2];
    slots[me.index % warp_lanes] = value;
    grid->meet(warp.meeting, warp_lanes, State::warp, {file, line}, nullptr);
    return slots[from];
}

void *map_shared(void *address, unsigned rank) {
    Lane &me = grid->lane();
    Gang &gang = *me.block->gang;
    const std::size_t offset = static_cast<std::size_t>(static_cast<char *>(address) - me.block->shared.data());
    if (rank >= gang.blocks.size()) {
        grid->fail(me, "maps the shared memory of block " + std::to_string(rank) + " of a cluster of " +
                           std::to_string(gang.blocks.size()));
    }
    if (offset > grid->launch.shared_bytes) grid->fail(me, "maps an address that is not in its shared memory");
    return gang.blocks[rank]->shared.data() + offset;
}

void pause() { grid->pause(); }

void fence() {
    Lane &me = grid->lane();
    me.fenced = true;
    for (const void *&address : me.atomics) {
        acquire_tag(address);
        address = nullptr;
    }
}

void before_atomic(const void *address) {
    Lane &me = grid->lane();
    if (me.fenced) release_tag(address);
    me.fenced = false;  // for one atomic only: ThreadSanitizer cannot tell what was written after the fence
}

void after_atomic(const void *address) {
    Lane &me = grid->lane();
    me.atomics[me.next_atomic++ % 4] = address;
}

void add_kernel(const EmuKernel *kernel) { kernels().push_back(kernel); }

}  // namespace emu

const EmuKernel *emu_find(const char *name) {
    for (const EmuKernel *kernel : kernels()) {
        if (std::strcmp(kernel->name, name) == 0) return kernel;
    }
    return nullptr;
}

void emu_run(const EmuKernel *kernel, const EmuLaunch *launch) {
    Grid it(*kernel, *launch);
    grid = &it;
    it.run();
    grid = nullptr;
}

void emu_rest() { free_idle_fibers(); }
