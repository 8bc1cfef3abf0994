// The threads that compute the steps of an image together.
//
// A parallel loop of torch's takes microseconds to begin and to end, as long as many a layer takes. So there is one for
// all steps: the thread that leads goes through them and offers the parts of each, the others look for parts with their
// number. A part that its thread has not begun when the leader is done with its own, the leader computes: nothing
// depends on the others being there, whatever pool they come from and however many they are.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>

extern "C" int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

namespace quant2e {

class Team {
 public:
  using Part = void (*)(const void* given, int64_t part);

  explicit Team(int64_t threads) : threads(threads), taken(new Taken[threads]) {}

  // Runs `lead(given)` on this thread while those of torch's pool help it to compute what it shares.
  void run(void (*lead)(const void* given, Team&), const void* given) {
    Call call{*this, lead, given};
    const int32_t error = torch_parallel_for(0, threads, 1, [](int64_t begin, int64_t end, void* to) {
      const Call& c = *(const Call*)to;
      if (begin) return c.team.help(begin, end);
      c.team.attempt([&] { c.lead(c.given, c.team); });
      c.team.turn.store(kOver, std::memory_order_release);
    }, &call);
    if (failure) std::rethrow_exception(failure);
    if (error) throw std::runtime_error("quant2e: torch could not begin a parallel loop");
  }

  // Computes `part(given, 0)` to `part(given, parts - 1)`, of which there are no more than threads. Of the leader.
  void share(int64_t parts, Part part, const void* given) {
    const int64_t now = turn.load(std::memory_order_relaxed) + 1;
    this->part = part, this->given = given, done.store(0, std::memory_order_relaxed);
    for (int64_t i = parts; i < threads; ++i) taken[i].turn.store(now, std::memory_order_relaxed);
    turn.store(now, std::memory_order_release);
    int64_t own = 0;
    for (int64_t i = 0; i < parts; ++i)
      if (take(i, now)) compute(i), ++own;
    for (int64_t waited = 0; done.load(std::memory_order_acquire) + own < parts;) wait(waited);
    if (failed.load(std::memory_order_relaxed)) throw Stopped();
  }

 private:
  static constexpr int64_t kOver = -1;
  static constexpr int64_t kSpins = 4096;  // some hundred microseconds, before the processor is given to others

  struct Call {
    Team& team;
    void (*lead)(const void*, Team&);
    const void* given;
  };
  struct alignas(64) Taken {
    std::atomic<int64_t> turn{0};  // in which this part was taken last
  };
  struct Stopped {};  // a part failed: the steps behind it are not computed

  const int64_t threads;
  const std::unique_ptr<Taken[]> taken;
  Part part = nullptr;
  const void* given = nullptr;
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  alignas(64) std::atomic<int64_t> turn{0};  // counts what is shared
  alignas(64) std::atomic<int64_t> done{0};  // parts that others computed

  // Each part is taken once a turn. Who took one may read `part` and `given`: the leader waits for it.
  bool take(int64_t i, int64_t now) {
    int64_t before = now - 1;
    return taken[i].turn.compare_exchange_strong(before, now, std::memory_order_acq_rel);
  }

  void compute(int64_t i) {
    attempt([&] { part(given, i); });
  }

  // The first failure is kept for the thread that leads.
  template <class Work>
  void attempt(const Work& work) {
    try {
      work();
    } catch (const Stopped&) {
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }

  void help(int64_t begin, int64_t end) {
    for (int64_t seen = 0, waited = 0;;) {
      const int64_t now = turn.load(std::memory_order_acquire);
      if (now == kOver) return;
      if (now == seen) {
        wait(waited);
        continue;
      }
      for (int64_t i = begin; i < end; ++i)
        if (take(i, now)) compute(i), done.fetch_add(1, std::memory_order_release);
      seen = now, waited = 0;
    }
  }

  static void wait(int64_t& waited) {
    if (++waited > kSpins) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
};

}  // namespace quant2e
