// Team (team.h) on pools that it may meet: ./team_test POOL THREADS FAILS_AT. Prints what was computed, and how it ended.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

std::string pool;

// side by side: a thread for each number. slow: those beside the first begin later. halves: half as many threads, of two
// numbers each. one: a single call. in turn: the others after the first has ended.
void loop(int64_t count, void (*work)(int64_t, int64_t, void*), void* given) {
  if (pool == "in turn") {
    for (int64_t i = 0; i < count; ++i) work(i, i + 1, given);
    return;
  }
  if (pool == "one") return work(0, count, given);
  const int64_t each = pool == "halves" ? 2 : 1;
  std::vector<std::thread> others;
  const auto begin = [&] {
    for (int64_t i = each; i < count; i += each)
      others.emplace_back([=] { work(i, std::min(i + each, count), given); });
  };
  std::thread starter;
  if (pool == "slow") starter = std::thread([&] { std::this_thread::sleep_for(std::chrono::milliseconds(1)), begin(); });
  else begin();
  work(0, each, given);
  if (starter.joinable()) starter.join();
  for (std::thread& other : others) other.join();
}

struct Work {
  int64_t threads, fails_at;  // a step whose last part fails
  std::vector<int64_t> values;
  int64_t steps = 0;
};

// Each step adds up what the step before has written, so that a part that came too early or too late is seen.
void lead(const void* given, quant2e::Team& team) {
  Work& w = *(Work*)given;
  for (; w.steps < 3000; ++w.steps) {
    const int64_t parts = 1 + w.steps % w.threads;
    std::vector<int64_t> next(w.values.size());
    struct Step { Work& w; std::vector<int64_t>& next; int64_t parts; } step{w, next, parts};
    team.share(parts, [](const void* to, int64_t part) {
      const Step& s = *(const Step*)to;
      if (s.w.steps == s.w.fails_at && part == s.parts - 1) throw std::runtime_error("a part failed");
      const int64_t n = s.next.size(), begin = n * part / s.parts, end = n * (part + 1) / s.parts;
      for (int64_t i = begin; i < end; ++i) s.next[i] = (s.w.values[i] * 31 + s.w.values[n - 1 - i] + 7) % 1000003;
    }, &step);
    w.values = next;
  }
}

}  // namespace

extern "C" int32_t torch_parallel_for(int64_t, int64_t count, int64_t, void (*work)(int64_t, int64_t, void*), void* given) {
  if (pool == "none") return 1;
  loop(count, work, given);
  return 0;
}

int main(int, char** arguments) {
  pool = arguments[1];
  Work work{std::atoll(arguments[2]), std::atoll(arguments[3]), std::vector<int64_t>(64)};
  for (int64_t i = 0; i < 64; ++i) work.values[i] = i;
  const char* end = "done";
  std::string message;
  try {
    quant2e::Team(work.threads).run(lead, &work);
  } catch (const std::exception& error) {
    message = error.what(), end = message.c_str();
  }
  int64_t sum = 0;
  for (int64_t value : work.values) sum = (sum * 31 + value) % 1000003;
  std::printf("%lld steps, %lld, %s\n", (long long)work.steps, (long long)sum, end);
}
