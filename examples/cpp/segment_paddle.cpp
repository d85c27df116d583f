// Predict the labels of an image by an exported segmentation model in Paddle Inference.
//
//   segment_paddle FOLDER IMAGE LABELS.png
//
// Not run, because Paddle's wheels have no headers of Paddle Inference. This program needs its C++
// library: build it from Paddle's source or download it from Paddle.
#include <iostream>
#include <paddle_inference_api.h>

#include "picture.hpp"

static void run(const std::string& folder, const std::string& file, const std::string& target) {
  const YAML::Node manifest = YAML::LoadFile(folder + "/deploy.yaml");
  if (manifest["format"].as<std::string>() != "paddle" ||
      manifest["task"].as<std::string>() != "segmentation" ||
      manifest["output_op"].as<std::string>() != "argmax")
    throw std::runtime_error(folder + ": expected a segmentation model that gives classes");
  const cv::Mat picture = read_picture(file);
  const cv::Mat x = transform(picture.clone(), manifest["transforms"]);

  paddle_infer::Config config;
  config.SetModel(folder + "/" + manifest["program"].as<std::string>(),
                  folder + "/" + manifest["weights"].as<std::string>());
  if (manifest["onednn"].as<bool>(false)) config.EnableMKLDNN();
  const auto engine = paddle_infer::CreatePredictor(config);
  const auto input = engine->GetInputHandle(engine->GetInputNames().at(0));
  std::vector<float> memory(3 * x.total());
  write_planes(x, memory.data());
  input->Reshape({1, 3, x.rows, x.cols});
  input->CopyFromCpu(memory.data());
  if (!engine->Run()) throw std::runtime_error(folder + ": the engine does not run");

  const auto output = engine->GetOutputHandle(engine->GetOutputNames().at(0));
  const std::vector<int> shape = output->shape();  // [1, H', W']
  std::vector<int> classes(size_t(shape.at(1)) * shape.at(2));
  output->CopyToCpu(classes.data());
  write_labels(classes.data(), {shape.at(2), shape.at(1)}, picture.size(), target);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: segment_paddle FOLDER IMAGE LABELS.png\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
