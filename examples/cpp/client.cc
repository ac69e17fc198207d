// A client in C++ that knows nothing of sharednorm but its contract, proto/sharednorm/v1.
//
// Creates a layer, takes one training step under a key, asks for the gradients, sends the step once more as if its answer
// had been lost, and reads the statistics. docs/protocol.md says how it is built.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "sharednorm/v1/service.grpc.pb.h"

using namespace sharednorm::v1;  // NOLINT - an example

namespace {

constexpr int kBatch = 8, kMaps = 3, kHeight = 5, kWidth = 7;
constexpr int kPlane = kHeight * kWidth;
constexpr int kValues = kBatch * kMaps * kPlane;

// Ends the program if a call has failed, with the reason that the trailing metadata have.
void Require(const grpc::Status& status, const grpc::ClientContext& context, const char* method) {
  if (status.ok()) return;
  ErrorDetail detail;
  const auto& trailer = context.GetServerTrailingMetadata();
  const auto found = trailer.find("sharednorm-error-bin");
  if (found != trailer.end()) detail.ParseFromString({found->second.data(), found->second.size()});
  std::fprintf(stderr, "%s: %s %s\n", method, detail.reason().c_str(), status.error_message().c_str());
  std::exit(1);
}

// Makes a call that may take ten seconds.
template <typename Method, typename Request, typename Response>
void Call(BatchNormService::Stub& stub, Method method, const char* name, const Request& request, Response* response) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  Require((stub.*method)(&context, request, response), context, name);
}

// A tensor travels as its bytes, little-endian, in C order; its spec says what they are.
void SetTensor(const std::vector<float>& values, TensorSpec* spec, std::string* data) {
  spec->set_dtype(DATA_TYPE_FLOAT32);
  for (const int size : {kBatch, kMaps, kHeight, kWidth}) spec->add_shape(size);
  data->assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::vector<float> Tensor(const std::string& data) {
  std::vector<float> values(data.size() / sizeof(float));
  std::memcpy(values.data(), data.data(), data.size());
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string address = argc > 1 ? argv[1] : "127.0.0.1:50051";
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  const auto stub = BatchNormService::NewStub(channel);

  GetServerInfoResponse info;
  Call(*stub, &BatchNormService::Stub::GetServerInfo, "GetServerInfo", GetServerInfoRequest(), &info);
  std::printf("server %s, protocol %u, device %s\n", info.version().c_str(), info.protocol(), info.device().c_str());

  CreateLayerRequest create;
  create.mutable_ref()->set_namespace_("default");
  create.mutable_ref()->set_name("example/cpp");
  LayerConfig* config = create.mutable_config();
  config->set_kind(LAYER_KIND_BATCH_NORM_2D);
  config->set_maps(kMaps);
  config->set_epsilon(1e-5);
  config->set_init_factor(1.0);
  config->set_min_factor(0.1);
  config->set_affine(true);
  config->set_averaging(AVERAGING_STANDARD);
  config->set_nonfinite(NON_FINITE_POLICY_REFUSE);
  for (int map = 0; map < kMaps; ++map) create.mutable_initial_state()->mutable_scale()->add_values(1.0F);
  CreateLayerResponse created;
  Call(*stub, &BatchNormService::Stub::CreateLayer, "CreateLayer", create, &created);
  const LayerRef ref = created.layer().ref();  // also says which layer of that name it is

  // A change that is sent again must not be made twice: the key says that it is the same one.
  OpenSessionResponse session;
  Call(*stub, &BatchNormService::Stub::OpenSession, "OpenSession", OpenSessionRequest(), &session);
  IdempotencyKey key;
  key.set_session(session.session() + "\1\2\3\4\5\6\7\10");
  key.set_seq(1);

  std::mt19937 generator(0);
  std::normal_distribution<float> normal(3.0F, 2.0F);
  std::vector<float> x(kValues);
  for (float& value : x) value = normal(generator);

  ForwardRequest forward;
  *forward.mutable_ref() = ref;
  forward.set_mode(MODE_TRAIN);
  forward.set_keep_input(true);
  *forward.mutable_key() = key;
  SetTensor(x, forward.mutable_input(), forward.mutable_data());
  ForwardResponse step;
  Call(*stub, &BatchNormService::Stub::Forward, "Forward", forward, &step);
  const std::vector<float> y = Tensor(step.data());

  double worst = 0.0;
  for (int map = 0; map < kMaps; ++map) {
    double sum = 0.0, squares = 0.0;
    for (int image = 0; image < kBatch; ++image) {
      for (int at = 0; at < kPlane; ++at) sum += x[(image * kMaps + map) * kPlane + at];
    }
    const double mean = sum / (kBatch * kPlane);
    for (int image = 0; image < kBatch; ++image) {
      for (int at = 0; at < kPlane; ++at) squares += std::pow(x[(image * kMaps + map) * kPlane + at] - mean, 2);
    }
    const double deviation = std::sqrt(squares / (kBatch * kPlane) + 1e-5);
    for (int image = 0; image < kBatch; ++image) {
      for (int at = 0; at < kPlane; ++at) {
        const int index = (image * kMaps + map) * kPlane + at;
        worst = std::max(worst, std::abs((x[index] - mean) / deviation - y[index]));
      }
    }
  }
  std::printf("the step made version %llu of the layer; at most %.1e from the formula\n",
              static_cast<unsigned long long>(step.version()), worst);

  GetStatsRequest ask;
  *ask.mutable_ref() = ref;
  ask.set_include_gradients(true);
  GetStatsResponse before;
  Call(*stub, &BatchNormService::Stub::GetStats, "GetStats", ask, &before);

  BackwardRequest backward;
  *backward.mutable_ref() = ref;
  backward.set_saved_input(step.saved_input());  // the server has the forward's input still
  backward.set_update_grad(true);
  backward.set_update_param_grads(true);
  backward.set_momentum(1.0);  // added to what is there
  key.set_seq(2);
  *backward.mutable_key() = key;
  SetTensor(std::vector<float>(kValues, 1.0F), backward.mutable_grad(), backward.mutable_data());
  BackwardResponse gradients;
  Call(*stub, &BatchNormService::Stub::Backward, "Backward", backward, &gradients);
  std::printf("gradient of the bias: %g\n", gradients.bias_grad().values(0));

  Call(*stub, &BatchNormService::Stub::Backward, "Backward", backward, &gradients);
  std::printf("sent again: %s\n", gradients.replayed() ? "it was made before, and nothing was added" : "made twice!");

  GetStatsResponse after;
  Call(*stub, &BatchNormService::Stub::GetStats, "GetStats", ask, &after);
  const float added = after.state().bias_grad().values(0) - before.state().bias_grad().values(0);
  std::printf("running mean %.3f; added to the gradient of the bias: %g\n", after.state().mean().values(0), added);
  return worst < 2e-6 && gradients.replayed() && added == kBatch * kPlane ? 0 : 1;
}
