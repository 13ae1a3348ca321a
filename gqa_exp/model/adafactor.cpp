// A step of Adafactor for a matrix whose second moments are factored, in float32; gqa_exp/training/adafactor.py has
// the formulas. Each matrix is read from memory once, if its share of a thread fits the second cache, and nothing of
// its size is written but the matrix itself. Each thread has its share of the sums: another number of threads may
// change the last bits.
//
// Compiled by native.py for the processor it runs on.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "common.h"

namespace {

constexpr long kRows = 64;  // whose squares are summed in float32 before a column's sum in float64 takes them up

struct Sums {
  double of_weights = 0;          // their squares
  double of_updates = 0;          // theirs, before clipping
  std::vector<double> of_column;  // the gradient's squares in each
};

// Advances a running mean.
void advance(float& mean, double found, float weight) { mean += weight * (static_cast<float>(found) - mean); }

// At least this, and NaN if it is NaN.
double at_least(double x, double least) { return x < least ? least : x; }

}  // namespace

// Changes x, (rows, columns), by its gradient, and the means over columns (rows) and over rows (columns) of the
// squared gradient. Numbers: the weight of what is new in these means; eps, added to the squares; the least root mean
// square of x; the rate; the root mean square of the update from which on it is clipped. Returns whether memory was
// lacking.
extern "C" int adafactor(float* x, const float* gradient, float* over_columns, float* over_rows, long rows,
                         long columns, const float* numbers) try {
  const float weight = numbers[0], eps = numbers[1], least = numbers[2], rate = numbers[3], threshold = numbers[4];
  const double elements = static_cast<double>(rows) * static_cast<double>(columns);
  std::vector<Sums> sums(omp_get_max_threads());
  for (Sums& each : sums) each.of_column.resize(columns);
  std::vector<float> room(columns * (1 + sums.size()));
  float *column = room.data(), *some_squares = column + columns;  // factors; sums of some rows' squares by thread
  float size = 0;
#pragma omp parallel
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Share share(rows), own(columns);
    Sums& mine = sums[thread];
    float* some = some_squares + thread * columns;
    for (long first = share.begin; first < share.end; first += kRows) {
      std::fill(some, some + columns, 0.0f);
      for (long i = first; i < std::min(share.end, first + kRows); ++i) {
        const float *from = gradient + i * columns, *values = x + i * columns;
        float of_gradient = 0, of_weights = 0;
#pragma omp simd reduction(+ : of_gradient, of_weights)
        for (long j = 0; j < columns; ++j) {
          const float square = from[j] * from[j];
          some[j] += square;
          of_gradient += square;
          of_weights += values[j] * values[j];
        }
        mine.of_weights += of_weights;
        advance(over_columns[i], of_gradient / columns + eps, weight);
      }
      for (long j = 0; j < columns; ++j) mine.of_column[j] += some[j];
    }
#pragma omp barrier
    for (long j = own.begin; j < own.end; ++j) {
      double total = 0;
      for (long t = 0; t < threads; ++t) total += sums[t].of_column[j];
      advance(over_rows[j], total / rows + eps, weight);
      column[j] = 1 / std::sqrt(over_rows[j]);
    }
    double mean = 0;  // by every thread, rather than wait for one
    for (long i = 0; i < rows; ++i) mean += over_columns[i];
    mean /= rows;
    const auto row_factor = [=](long i) { return static_cast<float>(1 / std::sqrt(over_columns[i] / mean)); };
#pragma omp barrier
    for (long i = share.begin; i < share.end; ++i) {
      const float *from = gradient + i * columns, factor = row_factor(i);
      float updates = 0;
#pragma omp simd reduction(+ : updates)
      for (long j = 0; j < columns; ++j) {
        const float update = from[j] * factor * column[j];
        updates += update * update;
      }
      mine.of_updates += updates;
    }
#pragma omp barrier
#pragma omp single
    {
      double weights = 0, updates = 0;
      for (const Sums& each : sums) {
        weights += each.of_weights;
        updates += each.of_updates;
      }
      const double clip = at_least(std::sqrt(updates / elements) / threshold, 1);
      size = static_cast<float>(at_least(std::sqrt(weights / elements), least) * rate / clip);
    }
    for (long i = share.begin; i < share.end; ++i) {
      const float *from = gradient + i * columns, factor = row_factor(i);
      float* to = x + i * columns;
#pragma omp simd
      for (long j = 0; j < columns; ++j) to[j] -= size * (from[j] * factor * column[j]);
    }
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
